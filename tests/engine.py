"""Real vLLM engines on tiny random-weight models, inside the test's process."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vLLM is imported.
ENVIRONMENT = {
    # One process, so that tests can look into the caches.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # One thread: threads that wait for each other cost more than tiny models do,
    # above all beside another test's.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM looks for n-gram drafts with Numba, which sets the OpenMP threads of the whole process
    # to its own number of them.
    "NUMBA_NUM_THREADS": "1",
    # vLLM compiles a piece of its sampler even where the model is eager.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (reads OMP_NUM_THREADS)

VOCAB = 512

BASE = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    # Large enough that attention decides the next token.
    initializer_range=0.15,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

MAMBA2: dict[str, Any] = dict(
    mamba_n_heads=8,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_chunk_size=64,
)
"""Of models with Mamba-2 layers."""

SETTINGS: dict[str, Any] = dict(
    dtype="float32",
    max_model_len=1024,
    kv_cache_memory_bytes=32 << 20,
    enforce_eager=True,
    skip_tokenizer_init=True,
    seed=0,
)
"""vLLM's engine arguments unless a test says otherwise."""


@functools.cache
def _models_dir() -> Path:
    return Path(tempfile.mkdtemp(prefix="kivi-models-"))


@functools.cache
def _build(model_type: str, overrides: tuple[tuple[str, Any], ...]) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {name: list(x) if isinstance(x, tuple) else x for name, x in overrides}
    config = AutoConfig.for_model(model_type, **{**BASE, **given})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = _models_dir() / f"{model_type}-{abs(hash(overrides)):x}"
    model.save_pretrained(path)
    return str(path)


def tiny_model(model_type: str = "llama", **overrides: Any) -> str:
    """Path of a random-weight fp32 model of a transformers family, built from its config."""
    return _build(model_type, tuple(sorted(overrides.items())))


def gemma3(layers: str, window: int = 200, head_dim: int = 64, **overrides: Any) -> str:
    """A `tiny_model` of layers with a window ("w") and without ("f")."""
    kinds = {"w": "sliding_attention", "f": "full_attention"}
    return tiny_model(
        "gemma3_text",
        num_hidden_layers=len(layers),
        layer_types=tuple(kinds[letter] for letter in layers),
        head_dim=head_dim,
        sliding_window=window,
        query_pre_attn_scalar=head_dim,
        tie_word_embeddings=True,
        **overrides,
    )


def gemma3n(layers: int = 7, shared: int = 3) -> str:
    """A `tiny_model` whose last `shared` layers read the caches of the two before them.

    vLLM takes it that these are one with a window, and one without.
    """
    return tiny_model(
        "gemma3n_text",
        num_hidden_layers=layers,
        num_kv_shared_layers=shared,
        layer_types=(
            *("sliding_attention",) * (layers - shared - 1),
            "full_attention",
            *(("sliding_attention", "full_attention") * shared)[:shared],
        ),
        activation_sparsity_pattern=(0.0,) * layers,
        head_dim=64,
        sliding_window=200,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=32,
        laurel_rank=8,
        altup_num_inputs=4,
        tie_word_embeddings=True,
    )


def gemma4() -> str:
    """A `tiny_model` with windows, two head sizes and numbers of kv heads, and shared caches."""
    return tiny_model(
        "gemma4_text",
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=(*("sliding_attention",) * 3, *("full_attention", "sliding_attention") * 2)[:6],
        head_dim=64,
        global_head_dim=128,
        num_global_key_value_heads=1,
        sliding_window=200,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=32,
        tie_word_embeddings=True,
    )


def _let_vllm_look_at_numba() -> None:
    """Make a second engine of this process possible where the first has imported Numba.

    vLLM's CPU worker looks for Triton kernels in `vars(...)` of whatever is in any module.
    llvmlite's library answers to every name, `__dict__` too, with a function of that name.
    """
    if ffi := sys.modules.get("llvmlite.binding.ffi"):
        ffi.lib._fntab["__dict__"] = {}


@contextlib.contextmanager
def engine(model: str, kv_cache_dtype: str = "kivi2", **kwargs: Any) -> Iterator[Any]:
    """An `LLM` on a tiny model; `kivi={...}` are our options, the rest are vLLM's."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    kivi = kwargs.pop("kivi", None)
    if kivi is not None:
        kwargs["additional_config"] = {"kivi": kivi}
    _let_vllm_look_at_numba()
    llm = None
    try:
        llm = LLM(model, kv_cache_dtype=kv_cache_dtype, **{**SETTINGS, **kwargs})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()
        cleanup_dist_env_and_memory()  # what a refused start has made, too


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one request with their log-probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_cached_tokens: int = 0

    def difference(self, other: Answer) -> float:
        """Largest difference of log-probability; infinite if the tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max((abs(a - b) for a, b in pairs), default=0.0)


def sampling(max_tokens: int) -> Any:
    """Greedy sampling of exactly `max_tokens` tokens with log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True, detokenize=False
    )


def answer(output: Any) -> Answer:
    """The `Answer` in one of vLLM's request outputs."""
    completion = output.outputs[0]
    tokens = tuple(completion.token_ids)
    logprobs = tuple(
        step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)
    )
    return Answer(tokens, logprobs, output.num_cached_tokens or 0)


def generate(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """Greedy answers of `prompts` (token ids), all in one batch."""
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    outputs = llm.generate(inputs, sampling(max_tokens), use_tqdm=False)
    return [answer(o) for o in outputs]


def random_prompt(length: int, seed: int) -> list[int]:
    """`length` token ids, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def on_worker(llm: Any, function: Callable[[Any], Any]) -> Any:
    """Run `function(model_runner)` in the engine's worker."""
    return llm.collective_rpc(lambda worker: function(worker.model_runner))[0]
