"""The set-up script, as far as it goes without installing anything."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bootstrap(tmp_path: Path) -> ModuleType:
    """The script in a checkout of its own, so that nothing here is installed or removed."""
    (tmp_path / "tools").mkdir()
    copy = shutil.copy(ROOT / "tools" / "bootstrap.py", tmp_path / "tools")
    spec = importlib.util.spec_from_file_location("bootstrap", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_bootstrap(bootstrap: ModuleType, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, bootstrap.__file__],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_bootstrap_refuses_without_a_compiler(bootstrap: ModuleType, tmp_path: Path) -> None:
    done = _run_bootstrap(bootstrap, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "a C++ compiler (g++, clang++) is not on PATH" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_bootstrap_names_a_wrong_cxx(bootstrap: ModuleType) -> None:
    done = _run_bootstrap(bootstrap, CXX="no-such-compiler -O2")
    assert done.returncode == 1
    assert "(no-such-compiler)" in done.stderr
    assert "unset CXX" in done.stderr


def test_bootstrap_looks_for_a_fitting_python(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.SetupError, match=r"Python 3\.9\.2 .* 3\.11, 3\.12, 3\.13"):
        bootstrap.find_python()
    other = tmp_path / "python3.12"
    other.symlink_to(sys.executable)
    assert bootstrap.find_python() == str(other)


def test_bootstrap_shows_the_end_of_a_failed_step(bootstrap: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    steps = bootstrap.Steps(log)
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no space left')"]
    with pytest.raises(bootstrap.StepError, match=r"(?s)trying failed.*no space left") as caught:
        steps.run("trying", command)
    assert str(log) in str(caught.value)
    assert steps.ask("is it?", command) is False


def test_bootstrap_second_run_does_nothing(bootstrap: ModuleType, tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\n")
    (tmp_path / ".venv").mkdir()
    bootstrap.stamp_path().touch()
    done = _run_bootstrap(bootstrap, PATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    project.write_text("[project]\nname = 'other'\n")
    assert _run_bootstrap(bootstrap, PATH=str(tmp_path), CXX="").returncode == 1
