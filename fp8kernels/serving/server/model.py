"""The one model of a server, behind transformers' ModelManager: loaded before the port opens, never unloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.cli.serving.model_manager import ModelManager

from ..load import load, load_tokenizer
from .requests import Refused
from .settings import Settings


class OneModel(ModelManager):
    """What transformers' handlers ask for models; every name but the served ones is answered with 404.

    tokenizer   in a class of transformers; fast, as the streamer behind needs
    created     of the folder's config, seconds since 1970
    """

    def __init__(self, model: Any, tokenizer: Any, names: list[str], created: int = 0) -> None:
        super().__init__(device="cpu", model_timeout=-1)
        self.model, self.tokenizer, self.names, self.created = model, tokenizer, names, created

    @classmethod
    def of_folder(cls, folder: Path, settings: Settings) -> OneModel:
        """Load a folder.

        raises   as serving.load; ValueError if its tokenizer cannot stream
        """
        tokenizer = load_tokenizer(folder)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"the tokenizer in {folder} is a slow one, which cannot stream; save a fast one beside it")
        model = load(folder, head=settings.head, kv_cache=settings.kv_cache)
        created = int((folder / "config.json").stat().st_mtime)
        return cls(model, tokenizer, settings.names_for(folder), created)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that the model's positions reach, where its config says."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def check_name(self, name: str | None) -> str:
        """The name to answer under.

        raises   Refused with 404 and the names that exist
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            served = ", ".join(self.names)
            raise Refused(
                f"model {name[:100]!r} is not served here; served is {served}",
                status=404,
                code="model_not_found",
                parameter="model",
            )
        return name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as the client gave it: revisions belong to a hub."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model and its tokenizer, under any served name.

        raises   Refused with 404
        """
        self.check_name(model_id_and_revision)
        return self.model, self.tokenizer

    def entries(self) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": "fp8kernels"} for name in self.names
        ]

    def shutdown(self) -> None:
        """Nothing to unload: the model goes with the process."""
