"""Which kernels run: the library, the environment, instruction sets, the AMX kernels emulated."""

from __future__ import annotations

import json
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


# torch is imported once: each environment is a fork of that process, the library not yet loaded.
DISPATCH = """
import json, os, sys, torch
from kivi_vllm.ops import dispatch
for environment in json.loads(sys.argv[1]):
    if not os.fork():
        os.environ.update(environment)
        for _ in range(2): module = dispatch.operators('cpu')
        print(module.__name__, *dispatch.describe(), sep=' | ')
        sys.exit()
    os.wait()
    print("END", flush=True)
"""


def dispatched(*environments: dict[str, str]) -> list[str]:
    """What a process says of its operators in each: module, state, and the log's lines."""
    done = subprocess.run(
        [sys.executable, "-c", DISPATCH, json.dumps(environments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    *outputs, rest = done.stdout.split("END\n")
    assert len(outputs) == len(environments) and not rest, done.stdout
    return outputs


def test_environment_chooses() -> None:
    out, portable, reference, unknown = dispatched(
        {"KIVI_VLLM_CPU_LIBRARY": "/nowhere/libkivi_cpu.so"},
        {"KIVI_VLLM_CPU_ISA": "portable"},
        {"KIVI_VLLM_CPU_ISA": "reference"},
        {"KIVI_VLLM_CPU_ISA": "sse9"},
    )
    # The reference takes the place of a missing library.
    assert "kivi_vllm.ops.reference | reference (PyTorch, slow): no native kernels" in out
    assert out.count("KIVI operators on cpu") == 1  # said once
    assert "install kivi_vllm again" in out
    assert "kivi_vllm.ops.cpu.operators | native, portable (also: " in portable
    as_said = "kivi_vllm.ops.reference | reference (PyTorch), as KIVI_VLLM_CPU_ISA says | \n"
    assert as_said in reference
    assert "KiviConfigError: KIVI_VLLM_CPU_ISA is 'sse9'" in unknown


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


@pytest.mark.slow
def test_amx_kernels_on_emulated_tiles(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.Library(emulated, "amx")
    monkeypatch.setattr(operators, "load", lambda: native)
    assert native.available[:2] == ["amx", "avx512_vnni"]
    for case in (CASES + MORE)[7:36:2] + MORE[:6]:
        sim = simulator(case)
        requests = [sim.add(case.tokens), sim.add(2)]
        sim.run(*requests)
