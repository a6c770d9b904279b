"""Functions in a fresh process: results, reports, and children that fail or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common.child import Child, ChildError, report
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import members

# --------------------------------------------------------------- run in a child

_kept: list[str] = []


def keep(what: str) -> list[str]:
    _kept.append(what)
    return _kept


def environment() -> dict[str, str]:
    return dict(os.environ)


def count(to: int) -> str:
    print("what was going on", flush=True)
    for number in range(to):
        report(number)
    return "done"


def mistake() -> None:
    raise UserError("a mistake", "mend it", status=1)


class Awkward(Exception):
    """It cannot be made from its arguments alone, as pickle would."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def fail() -> None:
    print("what was going on", flush=True)
    print("RuntimeError: the real cause", flush=True)
    raise Awkward("this", "that")


def die(how: str) -> None:
    print("what was going on", flush=True)
    if how == "orphan":  # which holds our files open
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


# -------------------------------------------------------------------- the tests


def test_results_state_and_reports(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[int] = []
    said: list[str] = []
    with Child("a test", dict(os.environ), log) as child:
        assert child.call(keep, "a") == ["a"]
        assert child.call(keep, "b") == ["a", "b"], "the same process"
        assert _kept == [], "and not ours"
        assert child.call(count, 50, on_report=seen.append, update=said.append) == "done"
        assert child.call(len, "x" * 5_000_000) == 5_000_000
        assert child.call(str.upper, "x" * 5_000_000) == "X" * 5_000_000
        child.call(time.sleep, 0.3, update=said.append)
        pid = child.pid
    assert seen == list(range(50))
    assert said[-1] == "what was going on"
    assert log.read_text() == "what was going on\n"
    assert not members(pid)


def test_its_environment_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIVI_TEST_OURS", "1")
    wanted = {k: v for k, v in os.environ.items() if k != "KIVI_TEST_OURS"}
    with Child("a test", {**wanted, "KIVI_TEST_ITS": "2"}) as child:
        its = child.call(environment)
    assert its["KIVI_TEST_ITS"] == "2" and "KIVI_TEST_OURS" not in its
    assert os.environ["KIVI_TEST_OURS"] == "1" and "KIVI_TEST_ITS" not in os.environ
    assert not child.log.exists(), "nobody named it"


def test_a_users_mistake_does_not_end_the_child() -> None:
    with Child("a test", dict(os.environ)) as child:
        with pytest.raises(UserError, match="a mistake") as found:
            child.call(mistake)
        assert not isinstance(found.value, ChildError)
        assert (found.value.remedy, found.value.status) == ("mend it", 1)
        assert child.call(keep, "on") == ["on"]


def test_a_failure_names_the_log_and_the_first_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(ChildError, match="the engine of x failed: Awkward: this and that") as found,
        Child("the engine of x", dict(os.environ), log) as child,
    ):
        child.call(fail)
    for piece in (str(log), "what was going on", "first error in it: RuntimeError: the real cause"):
        assert piece in str(found.value)
    assert found.value.first_error == "RuntimeError: the real cause"
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(("how", "status"), [("kill", "-9"), ("exit", "3"), ("orphan", "3")])
def test_a_child_that_dies_is_an_error_with_its_log(how: str, status: str) -> None:
    start = time.monotonic()
    with (
        pytest.raises(ChildError, match=f"ended with status {status}") as found,
        Child("a test", dict(os.environ)) as child,
    ):
        pid = child.pid
        child.call(die, how)
    assert time.monotonic() - start < 20
    assert "what was going on" in str(found.value) and str(child.log) in str(found.value)
    assert child.log.exists(), "the message names it"
    child.log.unlink()
    assert not members(pid)


def test_a_child_that_does_not_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier child")
    with pytest.raises(ChildError, match="a test failed: it did not start") as found:
        Child("a test", {**os.environ, "PYTHONHOME": "/no/such/folder"}, log)
    assert found.value.remedy and log.read_text() == ""


def test_what_update_raises_ends_the_waiting_and_the_child() -> None:
    def enough(_: str) -> None:
        raise TimeoutError("no news")

    with (
        pytest.raises(TimeoutError, match="no news"),
        Child("a test", dict(os.environ)) as child,
    ):
        child.call(time.sleep, 60, update=enough)
    assert not members(child.pid)


PARENT = """
import os, sys, time
from benchmarks.common.child import Child
with Child("a test", dict(os.environ)) as child:
    print(child.pid, child.log, flush=True)
    child.call(time.sleep, 60)
"""


def test_a_child_does_not_outlive_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, log = parent.stdout.readline().split()
    assert members(int(pid))
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while members(int(pid)):
        assert time.monotonic() < end
        time.sleep(0.1)
    Path(log).unlink()


def test_nobody_to_report_to() -> None:
    with pytest.raises(RuntimeError, match="no child"):
        report(1)
