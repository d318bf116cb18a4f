"""From a checked body to transformers' handlers for /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from . import requests
from .model import OneModel
from .requests import Body, Refused

DEFAULT_TOKENS = 1024  # of an answer whose client names no limit, as in transformers' own server
TEMPLATE = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Sampling(BaseHandler):
    """What a request's numbers mean to generate(), beyond transformers' reading of them."""

    model_manager: OneModel

    def _build_generation_config(
        self,
        body: Body,
        model_generation_config: Any,
        use_cb: bool = False,  # noqa: FBT001, FBT002  transformers' signature
    ) -> Any:
        seedless = {name: value for name, value in body.items() if name != "seed"}  # the worker sets it when it is due
        config = super()._build_generation_config(seedless, model_generation_config, use_cb=use_cb)
        if body.get("temperature"):
            config.do_sample = True  # else a model that is greedy by default passes over temperature in silence
        if body.get("temperature") == 0:
            config.temperature = config.top_p = config.top_k = None  # unread by a greedy search, which warns of each
        config.num_beams = 1  # tokens are counted, streamed and stopped one by one
        return config

    def prepare(self, body: Body) -> tuple[Body, int]:
        """The body that the handler gets, and the tokens of its prompt.

        raises   Refused
        """
        body = self.checked(body)
        body["model"] = self.model_manager.check_name(body.get("model"))
        tokens = self.count(body)
        requests.fit(body, tokens, self.model_manager.context, DEFAULT_TOKENS)
        return body, tokens

    def checked(self, body: Body) -> Body:
        """The body's fields, each looked at."""
        raise NotImplementedError

    def count(self, body: Body) -> int:
        """Tokens of the prompt."""
        raise NotImplementedError


class Completions(Sampling, CompletionHandler):
    """/v1/completions: text goes on."""

    def checked(self, body: Body) -> Body:
        """As requests.completion."""
        return requests.completion(body)

    def count(self, body: Body) -> int:
        """As the handler will tokenize."""
        return len(self.model_manager.tokenizer(body["prompt"])["input_ids"])


class Chat(Sampling, ChatCompletionHandler):
    """/v1/chat/completions: messages are answered, through the tokenizer's own template."""

    def checked(self, body: Body) -> Body:
        """As requests.chat; refuses all where the tokenizer has no template, as a made-up one would spoil answers."""
        if not self.model_manager.tokenizer.chat_template:
            raise Refused(
                "the tokenizer of this model has no chat template; POST the text to /v1/completions instead",
                code="no_chat_template",
            )
        body = requests.chat(body)
        for name in body.get("chat_template_kwargs", {}):
            if name in TEMPLATE:
                raise Refused(
                    f"chat_template_kwargs.{name} is not for clients to set", parameter="chat_template_kwargs"
                )
        largest = self.model_manager.model.config.get_text_config().vocab_size
        for token in body.get("logit_bias", {}):
            if int(token) >= largest:
                raise Refused(f"logit_bias names token {token}; the model has {largest}", parameter="logit_bias")
        return body

    def count(self, body: Body) -> int:
        """As the handler will tokenize; what the template says against the messages goes to the client."""
        messages = self.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
        try:
            ids = self.model_manager.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tools=body.get("tools"),
                return_dict=True,
                tokenize=True,
                **body.get("chat_template_kwargs", {}),
            )["input_ids"]
        except Exception as error:  # templates raise what they like
            raise Refused(
                f"the model's chat template refuses the messages: {str(error)[:300]}",
                code="chat_template_error",
                parameter="messages",
            ) from error
        return len(ids)
