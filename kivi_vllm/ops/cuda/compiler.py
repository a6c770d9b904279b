"""NVRTC, the compiler that PyTorch's CUDA brings: CUDA C++ to code for one GPU, or to PTX."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

NAMES = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")


class CompilerError(RuntimeError):
    """NVRTC is not there, or does not compile."""


@functools.cache
def _library() -> ctypes.CDLL:
    """That of PyTorch's CUDA, as a package brings it; else of this process, or of the system."""
    for folder in _folders():
        if found := sorted(folder.glob("libnvrtc.so*")):
            for builtins in folder.glob("libnvrtc-builtins.so*"):  # looked for by name alone
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(found[0]))
    for name in (*NAMES, "/usr/local/cuda/lib64/libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilerError(f"libnvrtc is not there: install the package {package()}")


def package() -> str:
    """The package that has the compiler for PyTorch's CUDA."""
    major = (torch.version.cuda or "13").partition(".")[0]
    return "nvidia-cuda-nvrtc" + (f"-cu{major}" if major == "12" else "")


def _folders() -> list[Path]:
    """Of NVIDIA's packages, those for PyTorch's CUDA first."""
    spec = find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    major = (torch.version.cuda or "13").partition(".")[0]
    own = {"12": "cuda_nvrtc"}.get(major, f"cu{major}")
    folders = [path for root in roots for path in sorted(root.glob("*/lib"))]
    return sorted(folders, key=lambda path: path.parent.name != own)


def architecture_for(capability: int) -> str:
    """What to compile for a GPU: its own code, or, if it is newer than the compiler, PTX."""
    nvrtc, count = _library(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    older = [one for one in known if one <= capability]
    if not older:
        raise CompilerError(f"this NVRTC compiles for none of sm_{capability} and older")
    return f"sm_{capability}" if capability in older else f"compute_{max(older)}"


def available() -> bool:
    """Whether there is a compiler."""
    try:
        _library()
    except (CompilerError, OSError):
        return False
    return True


def compiled(
    source: str, name: str, options: Sequence[str], headers: Mapping[str, str], ptx: bool = False
) -> bytes:
    """What NVRTC makes of a source, a cubin or PTX.

    Args:
        source: CUDA C++ that includes nothing but `headers`.
        name: of its file, for messages.
        options: NVRTC's, with `--gpu-architecture=sm_90` or the like; `compute_90` for PTX.
        headers: texts by name.
        ptx: whether PTX is wanted.

    Raises:
        CompilerError: with the compiler's log.

    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    texts, names = (
        (ctypes.c_char_p * len(headers))(*(text.encode() for text in of))
        for of in (headers.values(), headers.keys())
    )
    _check(nvrtc, nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
    ))  # fmt: skip
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            raise CompilerError(_text(nvrtc, program, "ProgramLog").decode(errors="replace"))
        return _text(nvrtc, program, "PTX" if ptx else "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompilerError(nvrtc.nvrtcGetErrorString(status).decode())
