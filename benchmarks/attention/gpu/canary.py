"""What must hold on a GPU before a figure of it means anything: a minute, most telling first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
import typer
from triton.runtime.jit import JITFunction

from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, B
from benchmarks.attention.check import STEPS, check, kivi
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.work import TEMPLATE, Work
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from kivi_vllm.cli.errors import UserError
from kivi_vllm.ops.codec import encode_pages
from kivi_vllm.ops.triton import decode, prefill, ring, store

KERNELS = (
    decode._decode,
    decode._combine,
    prefill._prefill,
    store._store_blocks,
    ring._store_ring,
)

Result = dict[str, Any]


def canary(
    shape: Annotated[list[str] | None, typer.Option(help=", ".join(SHAPES))] = None,
    cache: Annotated[list[str] | None, typer.Option(help=", ".join(KIVI_DTYPES))] = None,
    smoke: Annotated[bool, typer.Option(hidden=True, help="Interpreted.")] = False,
    json_path: Json = None,
) -> None:
    """Check a product of fp16's smallest numbers, pages' bytes, and attention against float64."""
    check_folder("--json", json_path)
    shapes = among("--shape", shape or ["llama3-8b", "smollm2"], SHAPES)
    caches = among("--cache", cache or list(KIVI_DTYPES), KIVI_DTYPES)
    if smoke:
        from tests.triton.interpreted import repair

        repair()
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", "run this where `nvidia-smi` shows one", status=1)
    gpu = Gpu(smoke)
    checks: dict[str, Callable[[], str]] = {"product of subnormals": partial(_subnormals, gpu)}
    for name in shapes:
        for dtype in caches:
            checks[f"{name} {dtype}: bytes"] = partial(_bytes, gpu, name, dtype)
            checks[f"{name} {dtype}: attention"] = partial(_attention, gpu, name, dtype)
    rows: list[Result] = []
    for name, one in checks.items():
        begin = time.monotonic()
        try:
            row: Result = {"check": name, "holds": True, "what": one()}
            gpu.finish()
        except Exception as error:
            row = {"check": name, "holds": False, "what": brief(error)}
        rows.append(row | {"took_s": round(time.monotonic() - begin, 1)})
        print(f"{'ok  ' if row['holds'] else 'FAIL'} {name}: {row['what']}", flush=True)
        write_json(json_path, {"header": gpu.header(), "rows": rows, "kernels": kernels()})
    for kernel in kernels():
        print("  ".join(f"{key} {value}" for key, value in kernel.items()))
    if failed := sum(not row["holds"] for row in rows):
        raise UserError(f"{failed} of {len(rows)} checks fail", "time nothing before", status=1)


@triton.jit
def _product(a, b, out):  # type: ignore[no-untyped-def]
    """A product of [16, 16] matrices; one program."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None]
    at = 16 * i + j
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def _subnormals(gpu: Gpu) -> str:
    """Codes go into products as they lie, as fp16 numbers below its normal range."""
    codes = torch.arange(256, dtype=torch.int16).view(torch.float16).reshape(16, 16)
    factors = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).half()
    out = torch.zeros(16, 16, device=gpu.device)
    _product[(1,)](codes.to(gpu.device), factors.to(gpu.device), out)
    exact = codes.double() @ factors.double()
    error = float((out.cpu().double() - exact).norm() / exact.norm())
    if not error < 1e-5:
        raise ValueError(f"relative error {error:.2g}: this GPU takes them as zeros")
    return f"relative error {error:.1e}"


def _bytes(gpu: Gpu, name: str, dtype: str) -> str:
    """Pages that the kernels write against the reference's."""
    shape = SHAPES[name]
    work = Work(shape, 1, TEMPLATE, TEMPLATE)
    pool = KiviPool(shape, dtype, 1, 1, TEMPLATE // B, gpu.place)
    pool.allocate()
    pool.store("store_blocks", 0, work.rows, work.key.to(gpu.device), work.value.to(gpu.device))()
    stored = pool.pages[pool.tables[0, 0, : TEMPLATE // B].long(), 0].cpu()
    k, v = (x.unflatten(0, (-1, B)).transpose(1, 2) for x in (work.key, work.value))
    sinks = pool.fmt.sink_tokens
    expected = torch.cat(
        [encode_pages(k[:1], v[:1], pool.fmt, sinks), encode_pages(k[1:], v[1:], pool.fmt)]
    )
    if wrong := int((stored != expected).sum()):
        raise ValueError(f"{wrong} of {expected.numel()} bytes are not the reference's")
    return f"{expected.numel()} equal"


def _attention(gpu: Gpu, name: str, dtype: str) -> str:
    """All operators on small steps: a decode, a prompt, a prompt after a prefix."""
    shape = SHAPES[name]
    errors = check(shape, {dtype: partial(kivi, shape, dtype, place=gpu.place)}, gpu.device, STEPS)
    return f"relative error {errors[dtype]:.1e}"


def kernels() -> list[Result]:
    """What each kernel that was compiled here takes on the device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    found: list[Result] = []
    for function in KERNELS:
        caches: Any = function.device_caches if isinstance(function, JITFunction) else {}
        for kept in caches.values():
            found += [
                {
                    "kernel": function.__name__,
                    "warps": one.metadata.num_warps,
                    "stages": one.metadata.num_stages,
                    "registers": one.n_regs,
                    "spilled_bytes": one.n_spills,
                    "shared_bytes": one.metadata.shared,
                }
                for one in kept[0].values()
            ]
    return found


if __name__ == "__main__":
    start(canary)
