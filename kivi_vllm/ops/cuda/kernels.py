"""The kernels in CUDA C++: their variants, their argument, and their launches."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from dataclasses import dataclass
from importlib.resources import files

import torch

from kivi_vllm.ops import codes
from kivi_vllm.ops.cuda import compiler, driver
from kivi_vllm.ops.format import PageFormat

logger = logging.getLogger("vllm.kivi_vllm")

ENTRIES = {"decode": ("decode.cu", 32), "score": ("select.cu", 32), "choose": ("select.cu", 256)}
"""Kernels by name: their source, and the threads of a program."""

HEAD_SIZES = (64, 96, 128, 256)
"""For which the tests run it."""

MOST_NUMBERS = 2048
"""Head size times columns: of more, a program would not have registers enough."""

WANTED = os.environ.get("KIVI_VLLM_CUDA_DECODE", "1") != "0"
"""Whether to take this kernel where there is one; else Triton's."""


@dataclass(frozen=True)
class Variant:
    """What is known when they are compiled, in the words of their sources."""

    D: int
    K_BITS: int
    V_BITS: int
    G: int
    SINKS: int
    PER_BLOCK: int
    RING: int
    TAIL: int
    R: int
    GQA: int
    TILES: int
    N: int
    MASKED: bool
    BF16: bool
    CAP: float
    ALIBI: bool
    WINDOW: int
    CHUNK: int
    BUDGET: int = 0
    PAGES: int = 0

    @property
    def header(self) -> str:
        """Their definitions: `constants.cuh`, which the sources include first."""
        words = {name: f"{value:d}" for name, value in vars(self).items() if name != "CAP"}
        words |= {"CAP": f"{self.CAP!r}f", "ZERO_STEP": str(codes.zero_step(self.K_BITS))}
        words["CALL_BYTES"] = str(ctypes.sizeof(Call))
        return "".join(f"#define {name} {value}\n" for name, value in words.items())


def _fields(pointer: str, *numbers: str) -> list[tuple[str, type]]:
    return [(pointer, ctypes.c_void_p), *((name, ctypes.c_int64) for name in numbers)]


class Call(ctypes.Structure):
    """`Call` of `step.cuh`; strides are bytes."""

    _fields_ = (
        *_fields("query", "query_token", "query_head"),
        *_fields("query_start_loc"),
        *_fields("seq_lens"),
        *_fields("pages", "page_block", "page_page", "page_head"),
        *_fields("table", "table_row"),
        *_fields("key", "key_token", "key_head"),
        *_fields("value", "value_token", "value_head"),
        *_fields("ring", "ring_page", "ring_head", "ring_token"),
        *_fields("ring_table", "ring_row"),
        *_fields("tails", "tails_page", "tails_head", "tails_token", "tails_row"),
        *_fields("sinks", "sinks_page", "sinks_head", "sinks_token"),
        *_fields("sinks_table", "sinks_row"),
        *_fields("slopes"),
        *_fields("partial"),
        *_fields("statistics"),
        *_fields("generated"),
        *_fields("blocks"),
        *_fields("counts"),
        *_fields("estimates"),
        *_fields("counted"),
        ("scale", ctypes.c_float),
        ("splits", ctypes.c_int32),
        ("most_pages", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


@functools.cache
def _sources() -> dict[str, str]:
    """Their files by name."""
    folder = files("kivi_vllm.ops.cuda").iterdir()
    return {x.name: x.read_text() for x in folder if x.name.endswith((".cu", ".cuh"))}


@functools.cache
def compiled(variant: Variant, source: str, architecture: str, ptx: bool = False) -> bytes:
    """A cubin of a file for `sm_90` or the like; PTX for `compute_90`.

    Raises:
        CompilerError: there is no NVRTC, or it does not know the architecture.

    """
    options = ["--std=c++17", f"--gpu-architecture={architecture}"]
    headers = {name: text for name, text in _sources().items() if name.endswith(".cuh")}
    headers["constants.cuh"] = variant.header
    return compiler.compiled(_sources()[source], source, options, headers, ptx)


def serves(fmt: PageFormat, dtype: torch.dtype, columns: int) -> bool:
    """Whether there is a kernel for these pages, queries of this dtype, and columns of a tile."""
    return (
        fmt.two_level
        and not fmt.is_raw
        and fmt.head_size in HEAD_SIZES
        and fmt.head_size * columns <= MOST_NUMBERS
        and dtype in (torch.bfloat16, torch.float16)
    )


def kernel(variant: Variant, device: torch.device, name: str = "decode") -> driver.Kernel | None:
    """A kernel for a GPU of this process, which is current; None: Triton's must do."""
    return kernel_of(variant, device, name) if WANTED and device.type == "cuda" else None


@functools.cache
def kernel_of(variant: Variant, device: torch.device, name: str) -> driver.Kernel | None:
    """What is compiled and loaded for a GPU, once."""
    major, minor = torch.cuda.get_device_capability(device)
    source, threads = ENTRIES[name]
    try:
        architecture = compiler.architecture_for(10 * major + minor)
        code = compiled(variant, source, architecture, architecture.startswith("compute"))
        found = driver.load(code, name, threads)
    except (compiler.CompilerError, driver.DriverError, OSError) as error:
        instead = ", Triton's takes its place, and is slower" if name == "decode" else ""
        text = str(error).splitlines()[0]
        logger.warning("the CUDA kernel %s cannot be had%s: %s", name, instead, text)
        return None
    if spilled := found.spilled_bytes:
        logger.warning("the CUDA kernel %s keeps %d bytes a thread in memory", name, spilled)
    return found


def launch(
    kernel: driver.Kernel, grid: tuple[int, int, int], fields: dict[str, int | float]
) -> None:
    """Launch on the current stream of the current device; `fields` are those of `Call`."""
    driver.launch(kernel, grid, Call(**fields), torch.cuda.current_stream().cuda_stream)
