"""What a comparison must know of a model before any engine starts, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from kivi_vllm.cli.errors import UserError

ITEMSIZE = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
DTYPES = ("auto", *ITEMSIZE)


@dataclass(frozen=True)
class ModelFacts:
    """Of a model.

    Attributes:
        limit: tokens of its longest context.
        dtype: of its weights, as its config says.
        numbers_per_token: keys and values of one token, over all layers and kv heads.

    """

    limit: int
    dtype: str
    numbers_per_token: int

    def cache_bytes(self, dtype: str, tokens: int) -> int:
        """Bytes of an unquantized cache of some tokens."""
        return self.numbers_per_token * ITEMSIZE[self.dtype if dtype == "auto" else dtype] * tokens


def model_facts(model: str) -> ModelFacts:
    """Read a model's config.

    Raises:
        UserError: it has none, or none of a decoder that this can be told of.

    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelFacts(
            limit=config.max_position_embeddings,
            dtype=str(config.dtype or "bfloat16").removeprefix("torch."),
            numbers_per_token=2 * config.num_hidden_layers * heads * size,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{model} is no folder of a decoder model: {error}", "name one that vLLM can serve"
        ) from None
