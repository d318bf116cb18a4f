"""Settings of a server, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENGINES = ("auto", "transformers", "vllm")
KEY = "FP8KERNELS_API_KEY"  # of the environment, as arguments are seen by every user of the machine


@dataclass(frozen=True)
class Settings:
    """What a user sets; everything else follows from the folder.

    host, port      where to listen; port 0 is any free one
    names           further names of the model beside that of its folder
    engine          "transformers" in this process, "vllm" as its own command, "auto" for the one that fits
    head, kv_cache  as serving.load takes them
    waiting         requests that wait while one is answered; one more is refused with 503
    body_bytes      of one request; a larger one is refused with 413
    grace_seconds   that requests have to end after the first SIGTERM or SIGINT
    extra           further words for `vllm serve`

    raises          ValueError naming the setting
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    engine: str = "auto"
    head: str | None = None
    kv_cache: str | None = None
    waiting: int = 32
    body_bytes: int = 8 * 2**20
    grace_seconds: int = 30
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; it is one of {', '.join(ENGINES)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; ports go from 1 to 65535, and 0 is any free one")
        if self.waiting < 0:
            raise ValueError(f"waiting is {self.waiting} requests; it is 0 or more")
        if self.body_bytes < 1024:
            raise ValueError(f"body_bytes is {self.body_bytes}; a request needs at least 1024 bytes")
        if self.grace_seconds < 0:
            raise ValueError(f"grace_seconds is {self.grace_seconds}; it is 0 or more")
        if any(not name.strip() for name in self.names):
            raise ValueError("a name of the model is empty")

    def names_for(self, folder: Path) -> list[str]:
        """The names a client may use: the folder's own first, each once."""
        return list(dict.fromkeys([folder.resolve().name, *self.names]))
