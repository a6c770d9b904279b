"""A model's tokenizer and length, without the model."""

from __future__ import annotations

from collections.abc import Sequence

from kivi_vllm.cli.errors import UserError


class Tokens:
    """A model's tokenizer.

    Args:
        model: its folder, or its name on a hub.

    Attributes:
        positions: the longest sequence that its configuration speaks of; None if it does not. Some
            kinds of rotary scaling allow more.

    """

    def __init__(self, model: str) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            config = AutoConfig.from_pretrained(model).get_text_config()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer or configuration of {model} cannot be loaded: "
                f"{str(error).strip().splitlines()[0]}",
                "give the folder of a model (config.json, tokenizer.json, *.safetensors), or its "
                "name where a hub can be reached",
            ) from None
        self.positions: int | None = getattr(config, "max_position_embeddings", None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model begins with."""
        found: list[int] = self._tokenizer(text).input_ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        found: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return found

    def chat(self, text: str) -> list[int]:
        """Token ids of the model's chat template around a user's message."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise UserError("--chat: the model has no chat template", "leave --chat out")
        message = [{"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        # The template has the special tokens in it.
        found: list[int] = self._tokenizer(whole, add_special_tokens=False).input_ids
        return found
