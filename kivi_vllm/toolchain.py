"""The C++ compiler: torch.compile needs it on the CPU, Triton on a GPU."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

REMEDY = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, RHEL)"


def find_compiler() -> str | None:
    """The compiler of `$CXX`, else g++, else clang++; None if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    for name in named or ("g++", "clang++"):
        if found := shutil.which(name):
            return found
    return None


def torch_finds(compiler: str) -> bool:
    """Whether torch.compile comes to `compiler` by itself: it knows `$CXX` and g++ alone."""
    return bool(os.environ.get("CXX")) or Path(compiler).name == "g++"


def has_python_headers() -> bool:
    """Whether Python.h is there, which what torch.compile generates includes."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()
