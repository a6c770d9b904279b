"""Builds the native CPU kernels; all metadata is in pyproject.toml.

`kivi_vllm/ops/cpu/csrc` becomes one shared library of plain C functions. Each instruction set is a
translation unit compiled for it alone; the rest is compiled for any machine, and chooses among
them at run time. An instruction set that the compiler does not know is left out, and without a
compiler the package is built without the library: it then computes with PyTorch, and says so.

`CXX` names the compiler, `CXXFLAGS` adds flags (`-fsanitize=address -g`).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("kivi_vllm/ops/cpu/csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-rtti", "-Wall", "-Wextra"]
# GCC 12 takes the undefined lanes of its own intrinsics for mistakes of ours.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512_VNNI = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
X86 = {
    "amx": f"{AVX512_VNNI} -mamx-tile -mamx-int8",
    "avx512_vnni": AVX512_VNNI,
    "avx2": AVX2,
}


class BuildKernels(build_ext):
    """Compile the translation units, each with its own flags, and link them."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            self.warn("no C++ compiler: the CPU kernels are not built, PyTorch takes their place")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            link(compiler, compile_all(compiler, Path(folder)), target)

    def copy_extensions_to_source(self) -> None:
        if Path(self.get_ext_fullpath(self.extensions[0].name)).exists() or find_compiler():
            super().copy_extensions_to_source()


def find_compiler() -> list[str] | None:
    """`$CXX`, else g++, else clang++, as the beginning of a command."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def extra_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def openmp(compiler: list[str]) -> list[str]:
    """Only GCC's OpenMP is the one that torch brings: a second runtime would fight with it."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    return [] if "clang" in version.stdout else ["-fopenmp"]


def knows(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compile_all(compiler: list[str], folder: Path) -> list[Path]:
    """Object files of all instruction sets that the compiler knows, and of what joins them."""
    sets = {"portable": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= {name: flags for name, flags in X86.items() if knows(compiler, flags.split())}
    have = [f"-DKIVI_HAVE_{name.upper()}" for name in sets]
    units = {name: ["-fno-exceptions", *flags.split()] for name, flags in sets.items()}
    units["library"] = [*openmp(compiler), *have]

    def compile_one(name: str) -> Path:
        out = folder / f"{name}.o"
        command = [*compiler, *FLAGS, *units[name], *extra_flags()]
        subprocess.run([*command, "-c", str(CSRC / f"{name}.cpp"), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, units))


def link(compiler: list[str], objects: list[Path], target: Path) -> None:
    command = [*compiler, "-shared", *map(str, objects), *openmp(compiler), *extra_flags()]
    subprocess.run([*command, "-o", str(target)], check=True)


kernels = Extension(
    "kivi_vllm.ops.cpu.libkivi_cpu",
    sources=sorted(map(str, CSRC.glob("*.cpp"))),
    depends=sorted(map(str, CSRC.glob("*.h"))),
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
