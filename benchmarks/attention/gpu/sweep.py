"""Decode by both of our kernels, with more splits and with fewer: a device's word on the choice."""

from __future__ import annotations

from itertools import repeat
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, B
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.gpu.sections import MOST_SETS
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.timing import Call, Timed, interleave
from benchmarks.attention.work import Work
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from kivi_vllm.cli.errors import UserError
from kivi_vllm.ops.cuda import kernels
from kivi_vllm.ops.triton import decode

SPLITS = (0, 1, 2, 3, 4, 6, 9, 16, 32, 64, 128)
"""Of a row's pages; 0: what `num_splits` says."""

CASES = ((32, 32768), (1, 65536))
"""Sequences, and tokens of each."""


def sweep(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama3-8b",
    cache: Annotated[list[str] | None, typer.Option(help=", ".join(KIVI_DTYPES))] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds of timing a case.")] = 3.0,
    smoke: Annotated[bool, typer.Option(hidden=True, help="Interpreted: tiny.")] = False,
    json_path: Json = None,
) -> None:
    """Time `attend` at decode by kernel and by splits, in turn; ratios are to the default."""
    check_folder("--json", json_path)
    among("--shape", [shape], SHAPES)
    caches = among("--cache", cache or ["kivi2", "kivi_k3v2"], KIVI_DTYPES)
    if smoke:
        from tests.triton.interpreted import repair

        repair()
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", "run this where `nvidia-smi` shows one", status=1)
    gpu = Gpu(smoke)
    rows: list[dict[str, Any]] = []
    for batch, tokens in ((2, 2 * B),) if smoke else CASES:
        for name in caches:
            where = {"cache": name, "batch": batch, "context": tokens}
            rows += [where | row for row in _case(gpu, shape, name, batch, tokens, budget)]
            write_json(json_path, {"header": gpu.header(), "rows": rows})
    for row in rows:  # PyTorch and Triton suffice to measure: no tables
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def _case(
    gpu: Gpu, shape: str, cache: str, batch: int, tokens: int, budget: float
) -> list[dict[str, Any]]:
    work = Work(SHAPES[shape], batch, 1, tokens + B // 2, gpu.device)
    blocks = -(-work.end // B)
    one = KiviPool(work.shape, cache, 1, batch, blocks, gpu.place)
    sets = max(1, min(2 if gpu.smoke else MOST_SETS, gpu.free_bytes() // 2 // one.nbytes))
    pool = KiviPool(work.shape, cache, sets, batch, blocks, gpu.place)
    pool.prepare()
    calls: dict[tuple[str, int], Call] = {}
    failed: list[dict[str, Any]] = []
    for kernel, wanted in (("CUDA", True), ("Triton", False)):
        for splits in SPLITS:
            try:
                calls[kernel, splits] = _captured(gpu, pool, work, wanted, splits)
            except Exception as error:  # the others may do without it
                gpu.finish()
                failed.append({"kernel": kernel, "splits": splits, "failed": brief(error)})
    things = {str(key): Timed([call], repeat(0)) for key, call in calls.items()}
    times = interleave(things, budget, stopwatch=gpu.stopwatch)
    found = {key: times[str(key)].ms / sets for key in calls}
    first = next(iter(found.values()), 1.0)
    made = [
        {"kernel": kernel, "splits": splits, "ms": round(ms, 5), "ratio": round(ms / first, 4)}
        for (kernel, splits), ms in found.items()
    ]
    return made + failed


def _captured(gpu: Gpu, pool: KiviPool, work: Work, wanted: bool, splits: int) -> Call:
    """A graph of attention over all sets; which kernel, and how many splits, is decided here."""
    chosen = decode.num_splits
    with (
        mock.patch.object(kernels, "WANTED", wanted),
        mock.patch.object(decode, "num_splits", lambda *of: splits or chosen(*of)),
    ):
        return gpu.captured([pool.attention(i, work) for i in range(pool.sets)])[0]


if __name__ == "__main__":
    start(sweep)
