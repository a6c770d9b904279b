"""The checks of `kivi-vllm doctor` that import vLLM; run as a process of its own by doctor.py.

Prints one line per check: doctor.MARK and the check as JSON.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module, metadata

from kivi_vllm.cli.doctor import FAIL, INSTALL, MARK, OK, PROBED, WARNING, Check
from kivi_vllm.config import QUANTIZED_DTYPES

COMPANIONS = "pip uninstall torchvision torchaudio torchcodec"


def _torch(name: str) -> Check:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        where = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    return Check(name, OK, f"{torch.__version__} on {where}")


def _transformers(name: str) -> Check:
    try:
        import_module("transformers.models.llama.modeling_llama")
    except Exception as error:
        # PyPI's torchvision is built for torch with CUDA and does not load beside a CPU torch.
        guess = COMPANIONS if "torchvision" in str(error) else "pip install -U transformers"
        return Check(name, FAIL, f"Llama cannot be imported: {_last_line(error)}", guess)
    return Check(name, OK, metadata.version("transformers"))


def _vllm(name: str) -> Check:
    import_module("vllm")
    supported, finding = import_module("kivi_vllm.attention.versions").supported_vllm()
    if not supported:
        return Check(name, FAIL, finding, INSTALL)
    return Check(name, OK, finding)


def _dtypes(name: str) -> Check:
    """What `vllm serve` itself does: load the plugins, build the parser, parse, configure."""
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    refused = []
    for dtype in QUANTIZED_DTYPES:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                args: argparse.Namespace = parser.parse_args(["--kv-cache-dtype", dtype])
            CacheConfig(cache_dtype=args.kv_cache_dtype)
        except (Exception, SystemExit):
            refused.append(dtype)
    if refused:
        finding = f"vLLM refuses --kv-cache-dtype {', '.join(refused)}"
        remedy = "mend what is reported above; if nothing is, " + INSTALL
        return Check(name, FAIL, finding, remedy)
    return Check(name, OK, f"vLLM accepts {', '.join(QUANTIZED_DTYPES)}")


def _triton(name: str) -> Check:
    import torch

    gpu = torch.cuda.is_available()
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        if gpu:
            return Check(name, FAIL, "not installed", "pip install 'triton>=3.6'")
        return Check(name, OK, "not installed, and not needed without a GPU")
    if not gpu:
        return Check(name, OK, f"{version}; no GPU, so its kernels are not used")
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return Check(name, WARNING, f"{version}, tested with 3.6", "pip install 'triton>=3.6'")
    return Check(name, OK, version)


def _operators(name: str) -> Check:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    finding, remedy = import_module("kivi_vllm.ops.dispatch").describe(device)
    state = FAIL if finding.startswith("none") else WARNING if remedy else OK
    return Check(name, state, f"{device}: {finding}", remedy)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _check(name: str, function: Callable[[str], Check]) -> Check:
    try:
        return function(name)
    except Exception as error:
        return Check(name, FAIL, _last_line(error), "see the message; or reinstall: " + INSTALL)


def main() -> None:
    """Run the checks in the order of doctor.PROBED."""
    functions = (_torch, _transformers, _vllm, _dtypes, _triton, _operators)
    for name, function in zip(PROBED, functions, strict=True):
        print(f"\n{MARK}{json.dumps(asdict(_check(name, function)))}", flush=True)


if __name__ == "__main__":
    main()
