"""Functions in a fresh process, with an environment and a log of its own.

An engine of vLLM wants a process: a second one does not start where one has run, OpenMP reads its
environment once, and a process that ends gives back all its memory.

    with Child("the engine of kivi2", environment, log) as child:
        facts = child.call(worker.start, arguments)
        states = child.call(worker.states, window, on_report=print)

Functions, arguments and results are pickled. What a function leaves in its module is there for the
next call. The child and all that it has started end with the `with`, and with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import stop, tail
from kivi_vllm.cli.server import cause, latest

T = TypeVar("T")

_TURN_S = 0.1
"""How often reports are looked for; a result is not waited for so long."""

GRACE_S = 10.0
"""How long a child that nobody needs any more may take to end by itself."""

_reports: Connection | None = None


class ChildError(UserError):
    """A child failed; the message has the end of its log, and `first_error` the first one in it."""

    first_error = ""


class Failure(Exception):
    """What a function in the child raised, in words: not every exception can be pickled."""


def report(what: Any) -> None:
    """In a child: tell `on_report` of the call that runs."""
    if _reports is None:
        raise RuntimeError("there is nobody to report to: this is no child")
    _reports.send(what)


class Child:
    """A process, `pid`, that runs functions, one after the other.

    Args:
        name: of what it is, for messages: "the engine of kivi2".
        environment: all of it, not only what differs from ours.
        log: file of its output, kept. Without it a temporary one, kept only if the child fails.

    """

    def __init__(self, name: str, environment: Mapping[str, str], log: Path | None = None) -> None:
        self.name = name
        self._temporary = log is None
        self._idle = True
        if log is None:
            handle, path = tempfile.mkstemp(prefix="kivi-benchmark-", suffix=".log")
            os.close(handle)
            log = Path(path)
        self.log = log
        log.write_bytes(b"")
        context = multiprocessing.get_context("spawn")
        self._incoming, outgoing = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(1, context, _begin, (os.path.abspath(log), outgoing))
        with patch.dict(os.environ, environment, clear=True):  # the child inherits ours
            started = self._executor.submit(os.getpid)
        try:
            self.pid = started.result()
        except BrokenExecutor:
            self._executor.shutdown()
            raise self._failed("it did not start") from None
        finally:
            outgoing.close()  # now the child alone has it: its death ends what we read
        [self._process] = (p for p in multiprocessing.active_children() if p.pid == self.pid)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """End the process and everything that it has started."""
        try:
            self._end()
        finally:
            if self._temporary and not isinstance(error, ChildError):
                self.log.unlink(missing_ok=True)

    def call(
        self,
        function: Callable[..., T],
        *args: Any,
        on_report: Callable[[Any], object] | None = None,
        update: Callable[[str], object] | None = None,
    ) -> T:
        """Run a function in the child and wait for its result.

        What it gives to `report` goes to `on_report`, and ten times a second the log's last message
        to `update`. What that raises ends the waiting; the child then still works.

        Raises:
            UserError: raised by the function; the child goes on.
            ChildError: another exception of the function, or the child died.

        """
        try:
            self._idle = False
            future = self._executor.submit(_run, function, args)
            # A process that the child has started may hold the pool's pipes open: ask the system.
            while not wait([future], _TURN_S).done and self._process.is_alive():
                self._pass_on(on_report)
                if update is not None:
                    update(latest(tail(self.log, 5)))
            self._pass_on(on_report)
            if not wait([future], 2).done:
                raise BrokenExecutor
            self._idle = True
            return future.result()
        except Failure as failure:
            raise self._failed(str(failure)) from None
        except BrokenExecutor:
            end = time.monotonic() + 5  # the pool's own thread may be about to note it
            while (status := self._process.exitcode) is None and time.monotonic() < end:
                time.sleep(_TURN_S)
            raise self._failed(f"its process ended with status {status}") from None

    def _pass_on(self, on_report: Callable[[Any], object] | None) -> None:
        try:
            while self._incoming.poll():
                what = self._incoming.recv()
                if on_report is not None:
                    on_report(what)
        except EOFError:  # it died; `call` says so
            pass

    def _end(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._idle:  # let it release what it holds; but it may hang
            self._process.join(GRACE_S)
        # It has a session of its own; what it has started is in there.
        stop(SimpleNamespace(pid=self.pid, poll=self._process.is_alive), grace=1.0)  # type: ignore[arg-type]
        self._incoming.close()

    def _failed(self, what: str) -> ChildError:
        first = cause(self.log.read_text(errors="replace"))
        error = ChildError(
            f"{self.name} failed: {what}\nThe end of {self.log}:\n{tail(self.log, 20)}"
            + (f"\nThe first error in it: {first}" if first else ""),
            "read the log; `kivi-vllm doctor` checks the installation",
            status=1,
        )
        error.first_error = first
        return error


def _begin(log: str, outgoing: Connection) -> None:
    """Of the child: a session of its own, its output into the log, no life without its parent."""
    global _reports
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    _reports = outgoing
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # also in the middle of work: nobody waits for it


def _run(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise Failure(f"{type(error).__name__}: {error}") from None
