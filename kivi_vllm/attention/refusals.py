"""What the KIVI cache refuses at start, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kivi_vllm.attention import connectors, memory, ray_nodes, speculation
from kivi_vllm.attention.selection import start_line
from kivi_vllm.attention.versions import SUPPORTED, device_kind, minor, vllm_version
from kivi_vllm.config import (
    BLOCK_SIZE,
    HEAD_SIZES,
    PADDED_HEAD_SIZES,
    RECOMMENDED_DTYPE,
    KiviConfigError,
    is_kivi,
)
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.format import RAW_DTYPES, PageFormat
from kivi_vllm.toolchain import find_compiler, torch_finds

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_OTHER_DTYPE = "use --kv-cache-dtype auto or fp8 for this model"

ALSO = "\n  also: "
"""Between the reasons of one refusal."""


def check(vllm_config: VllmConfig) -> None:
    """Refuse an engine configuration that the KIVI cache cannot serve, or log what serves better.

    Args:
        vllm_config: complete, as the engine will get it. Configurations with
            other cache dtypes pass untouched.

    Raises:
        KiviConfigError: every reason, each with its remedy.

    """
    from vllm.logger import init_logger

    logger = init_logger("vllm.kivi_vllm")
    dtype = vllm_config.cache_config.cache_dtype
    if not is_kivi(dtype):
        additional = vllm_config.additional_config
        if isinstance(additional, dict) and "kivi" in additional:
            logger.warning("the 'kivi' options have no effect with --kv-cache-dtype %s", dtype)
        return
    from vllm.platforms import current_platform

    from kivi_vllm.attention.options import kivi_config

    config = kivi_config(vllm_config)
    problems = [*_model(vllm_config), *_settings(vllm_config), *_toolchain(vllm_config)]
    if not problems:
        fmt = PageFormat.of(
            config, vllm_config.model_config.get_head_size(), vllm_config.model_config.dtype
        )
        problems += memory.problems(vllm_config, config, fmt)
    if not problems and vllm_config.parallel_config.use_ray:  # it takes seconds, so last
        problems += ray_nodes.problems(vllm_config.parallel_config, current_platform.ray_device_key)
    if problems:
        raise KiviConfigError(f"--kv-cache-dtype {dtype}: " + ALSO.join(problems))
    if config.token_budget:
        model = vllm_config.model_config
        layers = model.get_total_num_hidden_layers()
        estimate = dispatch.backend(device_kind()).operators.limits.estimate(config)
        logger.info("%s", start_line(config, estimate, model.max_model_len, layers))
    if config.has_better:
        logger.info(
            "%s has 2-bit keys: %s takes a little more memory and loses much less "
            "(docs/quality.md)",
            dtype,
            RECOMMENDED_DTYPE,
        )


def _model(vllm_config: VllmConfig) -> Iterator[str]:
    model = vllm_config.model_config
    chunk = model.attention_chunk_size or 0
    kinds = {
        "multi-head latent attention (MLA)": model.use_mla,
        "an encoder-decoder": model.is_encoder_decoder,
        "no attention layers": model.is_attention_free,
        "pooling over attention that is not causal": (
            model.pooler_config is not None and model.attn_type == "encoder_only"
        ),
        f"attention chunks of {chunk} tokens, no multiple of {BLOCK_SIZE},": chunk % BLOCK_SIZE,
    }
    for kind, present in kinds.items():
        if present:
            yield f"models with {kind} are not supported; {_OTHER_DTYPE}"


def _settings(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    yield from _device(vllm_config)
    if cache.user_specified_block_size and cache.block_size != BLOCK_SIZE:
        yield (
            f"--block-size {cache.block_size} is not supported: pages hold {BLOCK_SIZE} tokens; "
            "leave --block-size out"
        )
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    known = {"sliding_window", *map(str, range(layers))}
    if unknown := [name for name in cache.kv_cache_dtype_skip_layers if name not in known]:
        yield (
            f"--kv-cache-dtype-skip-layers {' '.join(unknown)} names no layer; give numbers up to "
            f"{layers - 1}, or sliding_window"
        )
    if cache.kv_sharing_fast_prefill:
        yield (
            "--kv-sharing-fast-prefill is not supported: layers that share a cache must see the "
            "same tokens of a step; leave it out"
        )
    # Other connectors make vLLM itself disable the manager, and are refused by name.
    transfer = vllm_config.kv_transfer_config
    refused = transfer is not None and transfer.kv_connector not in (None, connectors.SERVED)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and not refused:
        remedy = "leave out --disable-hybrid-kv-cache-manager"
        if vllm_config.model_config.attention_chunk_size:  # there, vLLM itself may disable it
            remedy += (
                ", leave VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE unset, and do not "
                "speculate with EAGLE"
            )
        yield f"the full-precision residual needs the hybrid KV cache manager; {remedy}"
    attention = vllm_config.attention_config
    for backend in {attention.backend, *(attention.backend_per_kind or {}).values()} - {None}:
        if backend.name == "KIVI":
            continue
        # vLLM's own choice for Gemma-4, whose layers differ in head size.
        model_type = vllm_config.model_config.hf_text_config.model_type
        if backend.name == "TRITON_ATTN" and model_type.startswith("gemma4"):
            continue
        if cache.kv_cache_dtype_skip_layers and not current_platform.is_cpu():
            continue  # theirs
        yield (
            f"attention backend {backend.name} cannot read KIVI pages; leave the attention "
            "backend out, it follows from the cache dtype"
        )
    yield from connectors.problems(vllm_config)
    yield from speculation.problems(vllm_config)
    sizes = {
        "decode context": parallel.decode_context_parallel_size,
        "prefill context": parallel.prefill_context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            yield (
                f"{name} parallelism ({size}) is not supported: it deals the tokens of a sequence "
                f"out to ranks, and a page quantizes {BLOCK_SIZE} of them together; use "
                "--tensor-parallel-size instead"
            )
    if parallel.data_parallel_size > 1 and parallel.data_parallel_backend != "mp":
        yield (
            f"--data-parallel-backend {parallel.data_parallel_backend} is not tested; "
            "use --data-parallel-backend mp"
        )
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    if model.is_mm_prefix_lm and scheduler.long_prefill_token_threshold:
        yield (
            "images whose tokens see each other are computed in one step, which "
            "--long-prefill-token-threshold may forbid forever; leave it out"
        )
    if model.is_hybrid and parallel.pipeline_parallel_size > 1:
        yield (
            "a hybrid model in a pipeline is not supported: its stages would disagree about "
            "the tokens of a state; leave out --pipeline-parallel-size"
        )
    if parallel.use_ubatching:  # a layer would read the first micro-batch's tables for both
        yield "micro-batches are not supported; leave out --enable-dbo and --ubatch-size"
    if parallel.use_ray and not current_platform.ray_device_key:
        yield (
            f"vLLM has no Ray executor on {current_platform.device_name}; "
            "use --distributed-executor-backend mp"
        )
    if parallel.pipeline_parallel_size > 1 and current_platform.is_cpu():
        yield from _pipeline_on_cpus(vllm_config)


def _pipeline_on_cpus(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        yield (
            "vLLM's CPU workers make what stages hand over only when they compile, and fail at the "
            "first request of an eager pipeline, whatever the cache; leave out --enforce-eager"
        )


def _device(vllm_config: VllmConfig) -> Iterator[str]:
    """What the operators of this kind of device do not serve."""
    from vllm.platforms import current_platform

    from kivi_vllm.attention.options import kivi_config

    device = device_kind()
    try:
        limits = dispatch.backend(device).operators.limits
    except NotImplementedError:
        yield (
            f"there are operators for CPUs and NVIDIA GPUs only, not for "
            f"{current_platform.device_name}; use --kv-cache-dtype auto or fp8"
        )
        return
    except ImportError:
        line, remedy = dispatch.describe(device)
        yield f"the kernels cannot be loaded: {line}; {remedy}"
        return
    capability = current_platform.get_device_capability()
    oldest = limits.min_capability
    if oldest and not limits.serves(capability):
        found, needed = (".".join(map(str, tuple(x)[:2])) for x in (capability, oldest[0]))
        yield (
            f"{current_platform.get_device_name()} has compute capability {found}, and the kernels "
            f"need {needed} or newer ({oldest[1]}); use --kv-cache-dtype auto or fp8"
        )
    version, good = minor(vllm_version()), SUPPORTED[device]
    if version not in good:
        yield (
            f"{limits.devices} are served with vLLM {' or '.join(good)}, not {version}; "
            f"pip install 'kivi-vllm[{device}]'"
        )
    config = kivi_config(vllm_config)
    if config.token_budget and config.recipe not in limits.selects:
        yield (
            f"kivi.token_budget is not there for recipe {config.recipe!r} on {limits.devices}; "
            "leave it out, or kivi.recipe"
        )
    if config.token_budget and config.estimate not in (None, *limits.estimates):
        yield (
            f"kivi.estimate {config.estimate!r} is not there on {limits.devices}; leave it out, or "
            f"use one of: {', '.join(limits.estimates)}"
        )
    model = vllm_config.model_config
    if limits.needs_eager and vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        yield (
            f"{limits.needs_eager} looks at the device in every step, which CUDA graphs cannot; "
            "add --enforce-eager, or unset it"
        )
    # What no device serves is refused by `PageFormat`, with its remedy.
    unserved = set(HEAD_SIZES) - set(limits.head_sizes)
    # Gemma-4's layers without a window have a size of their own.
    for head_size in (model.get_head_size(), getattr(model.hf_text_config, "global_head_dim", 0)):
        if PADDED_HEAD_SIZES.get(head_size, head_size) not in unserved:
            continue
        yield (
            f"head size {head_size} is not supported on {limits.devices} (supported: "
            f"{', '.join(map(str, limits.head_sizes))}); {_OTHER_DTYPE}"
        )
    if model.dtype in set(RAW_DTYPES) - set(limits.model_dtypes):
        yield (
            f"--dtype {_name(model.dtype)} is not supported on {limits.devices}; "
            f"use --dtype {_name(limits.model_dtypes[0])}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _toolchain(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    if not current_platform.is_cpu():  # there, torch.compile makes Triton kernels
        return
    if compilation.mode == CompilationMode.NONE or compilation.backend != "inductor":
        return
    compiler = find_compiler()
    if compiler is None:
        yield (
            "torch.compile needs a C++ compiler and none was found; install one "
            "(apt-get install g++), set CXX, or pass --enforce-eager"
        )
    elif not torch_finds(compiler):
        yield f"torch.compile looks for $CXX or g++ only; set CXX={compiler}"
