"""Child processes of which none outlives us: each has a session of its own, ended as a whole."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

GRACE_S = 5.0


def members(session: int) -> list[int]:
    """The living processes of a session; those that ended and were not waited for do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in brackets: state, parent, process group, session.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] not in "ZX" and int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def stop(process: "subprocess.Popen[bytes]", grace: float = GRACE_S) -> None:
    """End a process started by `running` and every descendant that stayed in its session.

    Raises:
        RuntimeError: one of them survived SIGKILL.
    """
    try:
        _signal(members(process.pid), signal.SIGTERM)
        _wait_until_empty(process, grace)
    finally:
        # Also when a second Ctrl-C cuts the waiting short. multiprocessing's resource trackers
        # come last: they remove the shared memory of the others and then end by themselves.
        rest = [pid for pid in members(process.pid) if not is_tracker(pid)]
        _signal(rest, signal.SIGKILL)
        _signal(_wait_until_empty(process, 5.0), signal.SIGKILL)
        left = _wait_until_empty(process, 5.0)
    if left:
        raise RuntimeError(f"processes {left} do not end")


def is_tracker(pid: int) -> bool:
    """Whether it is multiprocessing's resource tracker, which removes others' shared memory."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `command` with its output in `log`; on leaving, nothing of it runs any more."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


def _signal(pids: Sequence[int], sign: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, sign)
        except ProcessLookupError:
            continue


def _wait_until_empty(process: "subprocess.Popen[bytes]", seconds: float) -> list[int]:
    """Wait for the session to empty; return who is left."""
    end = time.monotonic() + seconds
    while True:
        process.poll()  # reaps the first process
        left = members(process.pid)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)
