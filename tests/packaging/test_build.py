"""What `python -m build` makes installs into a clean environment, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from kivi_vllm import __version__

pytest.importorskip("build")

ROOT = Path(__file__).parents[2]
CUDA = {str(p.relative_to(ROOT)) for p in ROOT.glob("kivi_vllm/ops/cuda/*.cu*")}

TRY = """
import torch
import kivi_vllm
from kivi_vllm.ops import dispatch
from importlib.metadata import entry_points, version
(plugin,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "kivi")
assert callable(plugin.load())
print(kivi_vllm.__file__, version("kivi-vllm"), dispatch.backend("cpu").operators.__name__,
      dispatch.describe("cpu")[0], sep="|")
"""


def run(command: list[str | Path], **environment: str) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd="/", env=env, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(source: Path, out: Path, *options: str, **environment: str) -> Path:
    """The one file that `python -m build` makes of a source tree."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "-o", out, source]
    run(command, **environment)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the files that git knows, so that nothing built here gets into it."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return build(folder / "source", folder / "out", "--sdist")


@pytest.fixture
def source(sdist: Path, tmp_path: Path) -> Path:
    """The unpacked sdist: wheels are built of what is published."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / sdist.name.removesuffix(".tar.gz")


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Python of an environment without this project, which sees PyTorch and vLLM here."""
    venv.create(tmp_path / "venv", with_pip=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A path, and not a site: the editable installation of this project stays unknown there.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


def installed(clean: Path, wheel: Path) -> list[str]:
    """File, version, operators and their description of a wheel in the clean environment."""
    run([clean, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel])
    found = run([clean, "-c", TRY]).strip().splitlines()[-1].split("|")
    assert Path(found[0]).is_relative_to(clean.parents[1])
    return found


def test_sdist_has_what_a_build_needs(sdist: Path) -> None:
    assert sdist.name == f"kivi_vllm-{__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("kivi_vllm/ops/cpu/csrc/*.*")}
    assert sources | CUDA <= names
    assert not [name for name in names if name.startswith(("benchmarks/", ".git"))]


def test_without_a_compiler(source: Path, clean: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    wheel = build(source, tmp_path / "out", "--wheel", PATH=str(nothing), CXX="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert set(names) >= CUDA, "they are compiled where there is a GPU"
    assert {name.split("/")[0] for name in names} == {
        "kivi_vllm",
        f"kivi_vllm-{__version__}.dist-info",
    }
    _, version, operators, line = installed(clean, wheel)
    assert version == __version__
    assert operators == "kivi_vllm.ops.reference"
    assert line.startswith("reference (PyTorch, slow): no native kernels")


@pytest.mark.slow
def test_with_a_compiler(source: Path, clean: Path, tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++")
    wheel = build(source, tmp_path / "out", "--wheel", CXXFLAGS="-O1")  # quicker
    _, version, operators, line = installed(clean, wheel)
    assert version == __version__
    assert operators == "kivi_vllm.ops.cpu.operators"
    assert line.startswith("native, ")
