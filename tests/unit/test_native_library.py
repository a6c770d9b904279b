"""Which kernels run: the library, the environment, instruction sets, the AMX kernels emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kivi_vllm.config import KiviConfigError
from kivi_vllm.ops.cpu import library, operators
from tests.unit.native import INSTRUCTION_SETS, ROOT, simulator
from tests.unit.test_attend import CASES
from tests.unit.test_native import MORE


def test_this_machine_runs_what_it_says() -> None:
    native = library.load()
    assert native.isa == native.available[native.available[0] == "amx"]
    assert native.available[-1] == "portable"
    assert native.parallel


def test_unknown_instruction_set() -> None:
    with pytest.raises(
        KiviConfigError, match=r"'sse9', which .* use one of: .*portable, reference"
    ):
        library.load().select("sse9")
    assert library.load().isa == library.load().select(None)


def test_library_of_other_sources(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    source = 'extern "C" long kivi_call_bytes() { return 8; }'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(other)]
    subprocess.run(command, input=source, text=True, check=True)
    with pytest.raises(OSError, match="was built from other sources"):
        library.Library(other)


def dispatched(**environment: str) -> str:
    """What a fresh process says of its operators: module, state, and the log's lines."""
    code = (
        "import torch; from kivi_vllm.ops import dispatch\n"
        "for _ in range(2): module = dispatch.operators('cpu')\n"
        "print(module.__name__, *dispatch.describe(), sep=' | ')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def test_reference_takes_the_place_of_a_missing_library() -> None:
    out = dispatched(KIVI_VLLM_CPU_LIBRARY="/nowhere/libkivi_cpu.so")
    assert "kivi_vllm.ops.reference | reference (PyTorch, slow): no native kernels" in out
    assert out.count("KIVI operators on cpu") == 1  # said once
    assert "install kivi_vllm again" in out


def test_environment_chooses() -> None:
    out = dispatched(KIVI_VLLM_CPU_ISA="portable")
    assert "kivi_vllm.ops.cpu.operators | native, portable (also: " in out
    out = dispatched(KIVI_VLLM_CPU_ISA="reference")
    assert "kivi_vllm.ops.reference | reference (PyTorch), as KIVI_VLLM_CPU_ISA says | \n" in out
    assert "KiviConfigError: KIVI_VLLM_CPU_ISA is 'sse9'" in dispatched(KIVI_VLLM_CPU_ISA="sse9")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the AMX kernels on tiles that are emulated in C++."""
    if not has_avx512_vnni():
        pytest.skip("the AMX kernels need AVX-512 VNNI besides their tiles")
    folder = tmp_path_factory.mktemp("amx")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    flags = {"CXXFLAGS": "-DKIVI_EMULATE_AMX -O1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True, timeout=500)
    return folder / "kivi_vllm" / "ops" / "cpu" / "libkivi_cpu.so"


def has_avx512_vnni() -> bool:
    return "avx512_vnni" in INSTRUCTION_SETS


def test_amx_kernels_on_emulated_tiles(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.Library(emulated, "amx")
    monkeypatch.setattr(operators, "load", lambda: native)
    assert native.available[:2] == ["amx", "avx512_vnni"]
    for case in (CASES + MORE)[7:36:2] + MORE[:6]:
        sim = simulator(case)
        requests = [sim.add(case.tokens), sim.add(2)]
        sim.run(*requests)
