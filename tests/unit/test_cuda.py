"""The CUDA kernel compiles for the GPUs that are supported, without spills, and is found at work.

`pytest -rP tests/unit/test_cuda.py` shows what each variant takes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
from importlib import resources
from typing import Any

import pytest
import torch

from kivi_vllm.config import QUANTIZED_DTYPES, KiviConfig
from kivi_vllm.ops.cuda import compiler, driver
from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.format import PageFormat
from tests.unit.ahead import inspect_code

slow = pytest.mark.slow
needs_nvrtc = pytest.mark.skipif(not compiler.available(), reason="there is no NVRTC")

CAPABILITIES = (80, 89, 90, 100, 120)


def format_of(dtype: str, head_size: int, model: torch.dtype = torch.bfloat16) -> PageFormat:
    return PageFormat.of(KiviConfig.from_options(dtype, {}), head_size, model)


def variant(dtype: str, head_size: int, columns: int, **more: Any) -> cuda.Variant:
    fmt = format_of(dtype, head_size)
    plain = cuda.Variant(
        D=head_size, K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, G=fmt.group_size, SINKS=fmt.sink_tokens,
        PER_BLOCK=1, RING=fmt.raw_tokens, TAIL=1, R=0, GQA=columns // 2, TILES=1, N=columns,
        MASKED=False, BF16=True, CAP=0.0, ALIBI=False, WINDOW=0, CHUNK=0,
    )  # fmt: skip
    return dataclasses.replace(plain, **more)


ALL = dict(MASKED=True, CAP=30.0, ALIBI=True, WINDOW=1000, R=64, TAIL=20, PER_BLOCK=3, BF16=False)
SIZES = [(64, 8), (96, 8), (128, 8), (256, 8), (64, 16), (96, 16), (128, 16)]
VARIANTS = [variant(name, *size) for size in SIZES for name in QUANTIZED_DTYPES]
# No model of the largest heads has ALiBi.
VARIANTS += [
    variant(name, d, n, **ALL | {"ALIBI": d < 256}) for name in ("kivi2", "kivi3") for d, n in SIZES
]


def cases() -> list[Any]:
    """Each variant for one of the GPUs in turn; but one for each, they are slow."""
    found = []
    for i, one in enumerate(VARIANTS):
        capability = CAPABILITIES[i % len(CAPABILITIES)]
        name = f"K{one.K_BITS}V{one.V_BITS}-D{one.D}-N{one.N}{'-all' * one.MASKED}-{capability}"
        found.append(pytest.param(one, capability, id=name, marks=[slow] * (i not in (10, 11))))
    return found


@needs_nvrtc
@pytest.mark.parametrize(("one", "capability"), cases())
def test_neither_spills_nor_overflows(one: cuda.Variant, capability: int) -> None:
    binary = inspect_code(cuda.compiled(one, "decode.cu", f"sm_{capability}"), "decode", warps=1)
    print(binary)
    assert binary.spills == 0
    assert binary.shared <= 48 << 10, "more must be asked for"


def test_what_it_serves() -> None:
    bf16 = torch.bfloat16
    assert cuda.serves(format_of("kivi2", 128), bf16, 8)
    assert cuda.serves(format_of("kivi4", 128), bf16, 16)
    assert not cuda.serves(format_of("kivi2", 256), bf16, 16)
    assert not cuda.serves(format_of("kivi_raw", 128), bf16, 8)
    assert not cuda.serves(format_of("kivi2", 128, torch.float32), torch.float32, 8)
    paper = KiviConfig.from_options("kivi2", {"recipe": "paper"})
    assert not cuda.serves(PageFormat.of(paper, 128, bf16), bf16, 8)


def test_the_sources_are_installed_with_the_package() -> None:
    """The wheel is built by what pyproject.toml says: see tests/packaging."""
    folder = resources.files("kivi_vllm.ops.cuda")
    assert all(folder.joinpath(source).is_file() for source, _ in cuda.ENTRIES.values())


@needs_nvrtc
def test_a_source_that_does_not_compile() -> None:
    with pytest.raises(compiler.CompilerError, match="nothing"):
        compiler.compiled("int x = nothing;", "x.cu", ["--gpu-architecture=sm_90"], {})


def test_triton_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the driver or the compiler refuses, with one warning; and where it is not wanted."""
    gpu, one = torch.device("cuda", 0), variant("kivi2", 64, 8)

    def refuse(*_: Any) -> None:
        raise driver.DriverError("no kernel image")

    monkeypatch.setattr(cuda, "compiled", lambda *_: b"")
    monkeypatch.setattr(driver, "load", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda.kernel_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cuda.kernel(one, gpu) is None
        assert cuda.kernel(one, gpu) is None
    [record] = caplog.records
    assert "no kernel image" in record.getMessage()
    cuda.kernel_of.cache_clear()
    it = driver.Kernel(ctypes.c_void_p(), 168, 1 << 14, 0, 1)
    monkeypatch.setattr(driver, "load", lambda *_: it)
    assert cuda.kernel(one, gpu) is it
    assert cuda.kernel(one, torch.device("cpu")) is None
    assert caplog.records == [record]
    cuda.kernel_of.cache_clear()
    monkeypatch.setattr(driver, "load", lambda *_: dataclasses.replace(it, spilled_bytes=24))
    assert cuda.kernel(one, gpu, "score")
    assert (
        caplog.records[-1].getMessage() == "the CUDA kernel score keeps 24 bytes a thread in memory"
    )
    monkeypatch.setattr(cuda, "WANTED", False)
    assert cuda.kernel(one, gpu) is None
    cuda.kernel_of.cache_clear()
