"""`kivi-vllm plan` on the shapes of the most served models: `python -m benchmarks.reach`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Json, Memory, among, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.machine import header
from benchmarks.common.tables import show
from benchmarks.reach.models import SHAPES
from kivi_vllm.cli.plan import capacity, parse_memory
from kivi_vllm.config import is_kivi

DTYPES = ("auto", "fp8", "kivi_k3v2", "kivi2")
LENGTHS = (8192, 32768, 131072)
BATCHED = 8192
"""Tokens of a step: vLLM's default on large GPUs. The more, the more windows reserve."""


def rows(
    name: str,
    memory_bytes: int,
    dtypes: Sequence[str] = DTYPES,
    lengths: Sequence[int] = LENGTHS,
    strides: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """One for each cache dtype, hit stride and length: what fits, or why it is not served."""
    shape, found = SHAPES[name], []
    with TemporaryDirectory() as folder:
        path = shape.write(Path(folder))
        for dtype, stride, length in product(dtypes, strides, lengths):
            if length > shape.longest or (stride and not is_kivi(dtype)):
                continue
            try:
                plan = capacity(
                    path,
                    dtype,
                    memory_bytes,
                    length,
                    dtype="bfloat16",
                    max_num_batched_tokens=BATCHED,
                    mamba_ssm_cache_dtype=shape.state,
                    additional_config={"kivi": {"hit_stride": stride}} if stride else {},
                )
            except (ValueError, NotImplementedError) as error:
                row = {"refused": " ".join(str(error).split())}
            else:
                row = asdict(plan) | {
                    "block_tables": sum(part.groups for part in plan.parts),
                    "parts": {part.what: part.layers for part in plan.parts},
                }
            asked = {"cache_dtype": dtype, "hit_stride": stride, "max_model_len": length}
            found.append({"model": name, **asked} | row)
    return found


def command(
    model: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: all of them.")
    ] = None,
    hit_stride: Annotated[
        list[int] | None, typer.Option(help="The option of that name; repeatable.")
    ] = None,
    memory: Memory = "40GiB",
    json_path: Json = None,
) -> None:
    """Ask vLLM's own accounting how much the most served models' caches hold."""
    check_folder("--json", json_path)
    size, names = parse_memory(memory), among("--model", model or [*SHAPES], SHAPES)
    head = header("reach") | {"memory_bytes": size, "max_num_batched_tokens": BATCHED}
    found = [row for name in names for row in rows(name, size, strides=hit_stride or (0,))]
    sources = {name: SHAPES[name].source for name in names}
    write_json(json_path, {"header": head, "sources": sources, "rows": found})
    show(pd.DataFrame(found), forms={"sequences": ".2f"}, by=["model"])


if __name__ == "__main__":
    start(command)
