"""The configurations of the most served models, as far as their caches depend on them.

Layers, heads, head sizes, windows, states and longest sequences are those of the published models.
What only weights depend on is small: vocabularies, experts. Of multimodal models it is the text
model: the vision tower has no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAXTEXT = "MaxText, hf_model_configs.py"
SLIME = "slime, scripts/models"
DEFAULTS = "transformers, defaults of the class"


@dataclass(frozen=True)
class Shape:
    """A model's configuration.

    Attributes:
        model_type, architecture: as in its `config.json`.
        source: where the shape was read.
        fields: of the configuration, where they are not the class's defaults.
        state: dtype of its states, vLLM's `--mamba-ssm-cache-dtype`, as on GPUs.

    """

    model_type: str
    architecture: str
    source: str
    fields: dict[str, Any] = field(default_factory=dict)
    state: str = "auto"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.fields["max_position_embeddings"])

    def write(self, folder: Path) -> str:
        """Write it as a model's folder without weights; returns the folder."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, vocab_size=32000, **self.fields)
        config.architectures, config.dtype = [self.architecture], "bfloat16"
        config.save_pretrained(folder)
        return str(folder)


def _every(nth: int, layers: int, other: str = "sliding_attention") -> list[str]:
    """Kinds of layers of which each `nth` sees everything."""
    return ["full_attention" if i % nth == nth - 1 else other for i in range(layers)]


def _heads(layers: int, heads: int, kv_heads: int, head_size: int, longest: int) -> dict[str, Any]:
    return dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        max_position_embeddings=longest,
    )


def _gemma3(hidden: int, layers: int, heads: int, kv_heads: int, head_size: int) -> Shape:
    fields = dict(
        **_heads(layers, heads, kv_heads, head_size, 131072),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        sliding_window=1024,
        layer_types=_every(6, layers),
    )
    return Shape("gemma3_text", "Gemma3ForCausalLM", MAXTEXT, fields)


def _qwen3(hidden: int, layers: int, heads: int) -> Shape:
    fields = dict(**_heads(layers, heads, 8, 128, 40960), hidden_size=hidden)
    return Shape("qwen3", "Qwen3ForCausalLM", MAXTEXT, fields)


def _llama(hidden: int, layers: int, heads: int) -> Shape:
    fields = dict(**_heads(layers, heads, 8, 128, 131072), hidden_size=hidden)
    return Shape("llama", "LlamaForCausalLM", MAXTEXT, fields)


def _deltas(value_heads: int, layers: int) -> dict[str, Any]:
    """Gated delta nets, and attention in each fourth layer."""
    return dict(
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        layer_types=_every(4, layers, other="linear_attention"),
    )


def _gpt_oss(layers: int) -> Shape:
    fields = dict(num_hidden_layers=layers, num_local_experts=4, max_position_embeddings=131072)
    return Shape("gpt_oss", "GptOssForCausalLM", MAXTEXT, fields)


SHAPES: dict[str, Shape] = {
    "Llama-3.1-8B": _llama(4096, 32, 32),
    "Llama-3.3-70B": _llama(8192, 80, 64),
    "Llama-4-Scout": Shape(
        "llama4_text",
        "Llama4ForCausalLM",
        DEFAULTS,
        dict(num_local_experts=2, max_position_embeddings=1048576),
    ),
    "Qwen3-8B": _qwen3(4096, 36, 32),
    "Qwen3-32B": _qwen3(5120, 64, 64),
    "Qwen3-30B-A3B": Shape(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        MAXTEXT,
        dict(**_heads(48, 32, 4, 128, 262144), hidden_size=2048, num_experts=8),
    ),
    "Qwen3-Next-80B-A3B": Shape(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        MAXTEXT,
        dict(**_heads(48, 16, 2, 256, 262144), **_deltas(32, 48), hidden_size=2048, num_experts=16),
        "bfloat16",
    ),
    # vLLM's class for these needs torchvision; Qwen3-Next's has the same layers.
    "Qwen3.6-27B": Shape(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        f"{SLIME}/qwen3.5-27B.sh",
        dict(**_heads(64, 24, 4, 256, 262144), **_deltas(48, 64), hidden_size=5120, num_experts=16),
        "float32",
    ),
    "Qwen3.6-35B-A3B": Shape(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        MAXTEXT,
        dict(**_heads(40, 16, 2, 256, 262144), **_deltas(32, 40), hidden_size=2048, num_experts=16),
        "float32",
    ),
    "Qwen2.5-VL-7B": Shape(
        "qwen2",
        "Qwen2ForCausalLM",
        MAXTEXT,
        dict(
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            hidden_size=3584,
            max_position_embeddings=128000,
        ),
    ),
    "Qwen3-VL-30B-A3B": Shape(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        MAXTEXT,
        dict(**_heads(48, 32, 4, 128, 262144), hidden_size=2048, num_experts=8),
    ),
    "Gemma-3-12B": _gemma3(3840, 48, 16, 8, 256),
    "Gemma-3-27B": _gemma3(5376, 62, 32, 16, 128),
    "Gemma-4-E4B": Shape(
        "gemma4_text",
        "Gemma4ForCausalLM",
        MAXTEXT,
        dict(
            **_heads(42, 8, 2, 256, 131072),
            global_head_dim=512,
            num_kv_shared_layers=18,
            sliding_window=512,
            layer_types=_every(6, 42),
            hidden_size=2560,
            hidden_size_per_layer_input=256,
        ),
    ),
    "Gemma-4-31B": Shape(
        "gemma4_text",
        "Gemma4ForCausalLM",
        MAXTEXT,
        dict(
            **_heads(60, 32, 16, 256, 262144),
            global_head_dim=512,
            num_global_key_value_heads=4,
            attention_k_eq_v=True,
            num_kv_shared_layers=0,
            sliding_window=1024,
            layer_types=_every(6, 60),
            hidden_size=5376,
            hidden_size_per_layer_input=0,
        ),
    ),
    "gpt-oss-20b": _gpt_oss(24),
    "gpt-oss-120b": _gpt_oss(36),
    "Mistral-Small-3.2-24B": Shape(
        "mistral",
        "MistralForCausalLM",
        f"{DEFAULTS} mistral3",
        dict(**_heads(40, 32, 8, 128, 131072), hidden_size=5120, sliding_window=None),
    ),
    "GLM-4.5-Air": Shape(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        f"{SLIME}/glm4.5-106B-A12B.sh",
        dict(**_heads(46, 96, 8, 128, 131072), hidden_size=4096, n_routed_experts=8),
    ),
    "DeepSeek-R1": Shape(
        "deepseek_v3", "DeepseekV3ForCausalLM", MAXTEXT, dict(max_position_embeddings=163840)
    ),
    "Kimi-K2": Shape(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        f"{SLIME}/kimi-k2.sh",
        dict(num_attention_heads=64, num_key_value_heads=64, max_position_embeddings=131072),
    ),
    "OLMo-3.1-32B": Shape(
        "olmo3",
        "Olmo3ForCausalLM",
        MAXTEXT,
        dict(
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            hidden_size=5120,
            sliding_window=4096,
            layer_types=_every(4, 64),
            max_position_embeddings=65536,
        ),
    ),
    "Granite-4.0-H-Small": Shape(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "the model's config.json",
        dict(
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            hidden_size=4096,
            max_position_embeddings=131072,
            layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)],
            mamba_n_heads=128,
            mamba_d_head=64,
            mamba_d_state=128,
            mamba_n_groups=1,
            mamba_expand=2,
            num_local_experts=8,
        ),
        "bfloat16",
    ),
    "Nemotron-3-Nano-30B-A3B": Shape(
        "nemotron_h",
        "NemotronHForCausalLM",
        "the model's config.json",
        dict(
            **_heads(52, 32, 2, 128, 262144),
            hidden_size=2688,
            hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            mamba_num_heads=64,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
            n_routed_experts=8,
        ),
        "float32",
    ),
    "LFM2-8B-A1B": Shape(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "the model's config.json",
        dict(
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=8,
            hidden_size=2048,
            max_position_embeddings=128000,
            layer_types=[
                "full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)
            ],
            num_experts=4,
        ),
    ),
}
"""25 models, by name."""
