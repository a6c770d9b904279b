"""A child process that answers requests: JSON lines over its stdin and a pipe of ours."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import stop, tail
from kivi_vllm.cli.server import cause

Done = Callable[[int], object]
"""Called with the number of prompts or windows that are done so far."""


class EngineError(UserError):
    """An engine failed; the message has the end of its log."""


class Child:
    """A running `worker`.

    Args:
        name: of what it computes, for messages.
        module: to run, with the number of the pipe's file descriptor as its argument.
        log: where its output goes.
        env: its environment.

    """

    def __init__(self, name: str, module: str, log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._buffer = b""
        self._replies, write = os.pipe()
        try:
            with log.open("wb") as out:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", module, str(write)],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=env,
                    pass_fds=(write,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._replies)
            raise
        finally:
            os.close(write)

    def close(self) -> None:
        """End it and everything that it started."""
        try:
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.close()  # it ends when nobody can ask any more
            stop(self.process, grace=1.0)
        finally:
            os.close(self._replies)

    def ask(
        self,
        request: dict[str, Any],
        on_done: Done | None = None,
        waiting: Callable[[], object] | None = None,
    ) -> Any:
        """Send a request and wait for its result.

        Args:
            request: what `worker` understands.
            on_done: called with the number of prompts or windows that are done.
            waiting: called about twice a second while there is no answer.

        Raises:
            UserError: the request cannot be served; the child goes on.
            EngineError: it failed, or the child died.

        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        while True:
            reply = self._reply(waiting)
            if "done" in reply:
                if on_done is not None:
                    on_done(reply["done"])
            elif "mistake" in reply:
                raise UserError(reply["mistake"], reply.get("remedy", ""))
            elif "result" in reply:
                return reply["result"]
            else:
                self._failed(reply.get("error", ""))

    def _reply(self, waiting: Callable[[], object] | None) -> dict[str, Any]:
        """The next line; raises if the child died."""
        while b"\n" not in self._buffer:
            if self._readable(0.5):
                data = os.read(self._replies, 1 << 20)
                if not data:
                    self._failed()
                self._buffer += data
            elif self.process.poll() is not None and not self._readable(0):
                self._failed()  # a process that it started may still hold the pipe open
            elif waiting is not None:
                waiting()
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._replies], [], [], seconds)[0])

    def _failed(self, error: str = "") -> None:
        """Raise what the child said of its failure, or how it ended, and the end of its log."""
        status = None
        end = time.monotonic() + 5
        while not error and status is None and time.monotonic() < end:
            status = self.process.poll()
            time.sleep(0.05)
        what = error or f"its process ended with status {status}"
        first = cause(self.log.read_text(errors="replace"))
        raise EngineError(
            f"the engine of {self.name} failed: {what}\nThe end of {self.log}:\n"
            f"{tail(self.log, 20)}" + (f"\nThe first error in it: {first}" if first else ""),
            "read the log; `kivi-vllm doctor` checks the installation",
            status=1,
        )
