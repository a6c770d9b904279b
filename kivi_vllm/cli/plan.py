"""`kivi-vllm plan`: how much fits into a given memory, by cache dtype."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress

from kivi_vllm.attention.hooks.capacity import Capacity, capacity
from kivi_vllm.attention.refusals import ALSO
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import QUANTIZED_DTYPES, RECOMMENDED_DTYPE

CACHE_DTYPES = ("auto", "fp8", *reversed(QUANTIZED_DTYPES))


def parse_memory(text: str) -> int:
    """Bytes in "20GiB", "1.5 GB" or "268435456".

    Raises:
        UserError: the text is no positive size.

    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    size = 0
    if re.fullmatch(r"\s*\d*\.?\d+\s*([KMGT]?i?B)?\s*", text, re.IGNORECASE):
        with suppress(ValidationError):
            size = int(TypeAdapter(ByteSize).validate_python(text))
    if size <= 0:
        raise UserError(f"--memory {text!r} is not a size", "write it as in 20GiB, 512MiB or 8GB")
    return size


def plan_table(
    model: str, memory: str, max_model_len: int | None, additional_config: str = "{}"
) -> list[Capacity]:
    """Print what fits into `memory` by cache dtype, and return it.

    Args:
        model: folder or name, as for `vllm serve`.
        memory: as for `parse_memory`.
        max_model_len: longest sequence; None: the model's own.
        additional_config: JSON, as for `vllm serve --additional-config`.

    Raises:
        UserError: the memory is no size, the JSON no object, or no cache dtype can
            serve the model.

    """
    from rich.table import Table

    from kivi_vllm.cli.progress import console

    memory_bytes = parse_memory(memory)
    try:
        additional = dict(json.loads(additional_config))
    except (ValueError, TypeError):
        raise UserError(
            f"--additional-config {additional_config!r} is no JSON object",
            """write it as in --additional-config '{"kivi": {"residual_length": 32}}'""",
        ) from None
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
    table = Table(title=f"{model}: {memory} of KV cache")
    columns = ("tokens", "sequences of --max-model-len", "ratio", "prefix hits at multiples of")
    table.add_column("--kv-cache-dtype")
    for column in columns:
        table.add_column(column, justify="right")
    plans: list[Capacity] = []
    refused: list[str] = []
    for cache_dtype in CACHE_DTYPES:
        with console.status(f"asking vLLM about {cache_dtype}"):
            try:
                plan = capacity(
                    model,
                    cache_dtype,
                    memory_bytes,
                    max_model_len,
                    additional_config=additional,
                )
            except (ValueError, OSError, NotImplementedError) as error:
                reasons = str(error).strip().replace(ALSO, "; also: ") or repr(error)
                refused.append(f"{cache_dtype}: {reasons.splitlines()[0]}")
                continue
        plans.append(plan)
        own = f"auto ({plan.raw_dtype})" if cache_dtype == "auto" else cache_dtype
        ratio = f"{plan.tokens / plans[0].tokens:.2f}" if plans[0].cache_dtype == "auto" else ""
        hits = f"{plan.hits_at:,}" if plan.hits_at else "no prefix caching"
        table.add_row(own, f"{plan.tokens:,}", f"{plan.sequences:.2f}", ratio, hits)
    if plans:
        table.caption = f"--max-model-len {plans[0].max_model_len:,}"
        console.print(table)
        for plan in plans:
            if plan.cache_dtype == RECOMMENDED_DTYPE:
                _show_parts(plan)
    for line in refused:
        console.print(f"not possible: {line}", markup=False, soft_wrap=True)
    if not plans:
        raise UserError(
            f"nothing fits or the model {model!r} cannot be read",
            "see the reasons above: more --memory, a smaller --max-model-len, or another folder",
        )
    return plans


def _show_parts(plan: Capacity) -> None:
    """What a sequence's memory holds, if the model's layers differ."""
    from rich.table import Table

    from kivi_vllm.attention.groups.shown import STATES, layers_differ
    from kivi_vllm.cli.progress import console

    if not layers_differ(plan.parts):
        return
    title = f"{plan.cache_dtype}: the blocks of a sequence of {plan.max_model_len:,} tokens"
    table = Table(title=title)
    table.add_column("what they hold")
    for column in ("layers", "block tables", "tokens a block", "share"):
        table.add_column(column, justify="right")
    blocks = sum(part.blocks for part in plan.parts)
    for part in plan.parts:
        tokens = f"{part.tokens:,}" if part.tokens else "–"
        share = f"{part.blocks / blocks:.1%}".replace("%", " %")
        table.add_row(part.what, str(part.layers), str(part.groups), tokens, share)
    if any(part.what == STATES for part in plan.parts):
        table.caption = "States are as large with every cache dtype: they bound the gain."
    console.print(table)
