"""`kivi-vllm demo`: serve a small model with a KIVI cache, ask it something, show the gain.

One server is started. What a bf16 cache would hold comes from vLLM's own accounting of the model's
config, which needs no weights and no server (`attention.hooks.capacity`), in a process beside it:
`python -m kivi_vllm.cli.demo MODEL BYTES MAX_MODEL_LEN`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kivi_vllm.cli.default_model import cache_folder, default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, stop, tail
from kivi_vllm.cli.progress import note, step
from kivi_vllm.cli.server import Server, free_port, serve_command, serve_environment
from kivi_vllm.config import RECOMMENDED_DTYPE

QUESTION = "Why is the sky blue? Answer in two sentences."

PLANNED = re.compile(r"^bf16 tokens: (\d+)$", re.MULTILINE)

MakeCommand = Callable[[Path, str, int, Sequence[str]], list[str]]
PlanCommand = Callable[[Path, int, int], list[str]]


def plan_command(model: Path, memory_bytes: int, max_model_len: int) -> list[str]:
    """The command that prints how many tokens of bf16 cache fit into so much memory."""
    plan = [sys.executable, "-m", "kivi_vllm.cli.demo"]
    return [*plan, str(model), str(memory_bytes), str(max_model_len)]


@dataclass(frozen=True)
class Demo:
    """What to show.

    Args:
        model: folder of a model; None for the default model.
        question: what to ask.
        max_tokens: length limit of the answer.
        kv_cache_dtype: the cache format to compare with bf16.
        memory_mib: memory of the KV cache.
        max_model_len: longest sequence.
        timeout: seconds that the server may take to start.
        keep_log: keep the logs after success.
        command: makes the server's command line from model, dtype, port and options.
        plan: makes the command line that prints the tokens of a bf16 cache.
    """

    model: Path | None = None
    question: str = QUESTION
    max_tokens: int = 64
    kv_cache_dtype: str = RECOMMENDED_DTYPE
    memory_mib: int = 256
    max_model_len: int = 4096
    timeout: float = 900.0
    keep_log: bool = False
    command: MakeCommand = serve_command
    plan: PlanCommand = plan_command

    def run(self) -> None:
        """Run it; the last line on stdout is the result as one JSON object."""
        note(
            f"This serves a small model with --kv-cache-dtype {self.kv_cache_dtype}, asks it a "
            f"question, and compares what {self.memory_mib} MiB of KV cache hold with bf16. "
            "It takes a minute or two."
        )
        with _termination_unwinds():
            model = self._model()
            with self._planning(model) as bf16_tokens:
                tokens, answer, speed = self._serve(model)
                bf16 = bf16_tokens()
        self._report(bf16, tokens, speed)
        result = {
            "answer": answer,
            "kv_tokens_bf16": bf16,
            f"kv_tokens_{self.kv_cache_dtype}": tokens,
            "ratio": round(tokens / bf16, 2),
        }
        print(json.dumps(result), flush=True)

    def _model(self) -> Path:
        if self.model is None:
            return default_model()
        folder = self.model.expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--model {self.model}: there is no config.json in this folder",
                "name the folder of a model in Hugging Face's format, or leave --model out",
            )
        return folder

    @contextmanager
    def _planning(self, model: Path) -> Iterator[Callable[[], int]]:
        """Ask vLLM in the background what a bf16 cache holds; what is yielded waits for it."""
        cache = cache_folder()
        log = cache / "plan-bf16.log"
        command = self.plan(model, self.memory_mib << 20, self.max_model_len)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        with running(command, log, env, cwd=cache) as process:

            def tokens() -> int:
                title = f"how many tokens would {self.memory_mib} MiB of bf16 cache hold?"
                with step(title), suppress(subprocess.TimeoutExpired):
                    process.wait(self.timeout)
                ended = f"ended with status {process.poll()}"  # None: it still runs
                found = PLANNED.findall(log.read_text(errors="replace"))
                if process.returncode != 0 or not found:
                    raise UserError(
                        f"vLLM's accounting for bf16 {ended}. The end of {log}:\n{tail(log)}",
                        "run `kivi-vllm doctor`; the whole log is in the file named above",
                        status=1,
                    )
                return int(found[-1])

            yield tokens
        self._done_with(log)

    def _serve(self, model: Path) -> tuple[int, str, float]:
        """Serve with the quantized cache and ask; return its tokens, the answer and tokens/s."""
        # Eager: torch.compile would take longer than it can win back in one answer.
        options = [
            *("--dtype", "bfloat16", "--max-model-len", str(self.max_model_len)),
            *("--kv-cache-memory-bytes", str(self.memory_mib << 20), "--enforce-eager"),
        ]
        title = f"vllm serve {model.name} --kv-cache-dtype {self.kv_cache_dtype} --enforce-eager"
        with self._server(model, self.kv_cache_dtype, options) as server:
            with step(title) as update:
                tokens = server.wait_for_tokens(self.timeout, update)
                server.wait_until_healthy(self.timeout, update)
            answer, speed = self._ask(server, model.name)
        return tokens, answer, speed

    @contextmanager
    def _server(self, model: Path, dtype: str, options: Sequence[str]) -> Iterator[Server]:
        """A server that is gone, with all its processes, when the block is left."""
        cache, port = cache_folder(), free_port()
        log = cache / f"serve-{dtype}.log"
        command = self.command(model, dtype, port, options)
        with running(command, log, serve_environment(cache), cwd=cache) as process:
            try:
                yield Server(process, log, port)
            finally:
                with step("shutting the server down"):
                    stop(process)
        self._done_with(log)

    def _done_with(self, log: Path) -> None:
        if self.keep_log:
            note(f"Log: {log}")
        else:
            log.unlink()

    def _ask(self, server: Server, model: str) -> tuple[str, float]:
        """Ask through the OpenAI client, stream the answer; return it and tokens/s."""
        from openai import DefaultHttpxClient, OpenAI

        console = Console(highlight=False)
        console.print(f"\nQ: {self.question}\nA: ", markup=False, end="")
        client = OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1",
            api_key="none",
            http_client=DefaultHttpxClient(trust_env=False),  # no proxy for the loopback address
        )
        parts: list[str] = []
        times: list[float] = []
        with client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": self.question}],
            temperature=0.0,
            max_tokens=self.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            generated = 0
            for event in stream:
                if event.usage is not None:
                    generated = event.usage.completion_tokens
                if event.choices and (text := event.choices[0].delta.content):
                    times.append(time.monotonic())
                    parts.append(text)
                    console.print(text, markup=False, end="", soft_wrap=True)
        console.print("\n")
        # From the first piece to the last: without the time that the prompt took.
        took = times[-1] - times[0] if len(times) > 1 else 0.0
        return "".join(parts), (generated - 1) / took if took else 0.0

    def _report(self, bf16: int, tokens: int, speed: float) -> None:
        table = Table()
        for heading in ("cache", "tokens", "×"):
            table.add_column(heading, justify="left" if heading == "cache" else "right")
        table.add_row("bf16", f"{bf16:,}", "1.00")
        table.add_row(self.kv_cache_dtype, f"{tokens:,}", f"{tokens / bf16:.2f}")
        console = Console()
        console.print(f"A KV cache of {self.memory_mib} MiB, by vLLM's own accounting:")
        console.print(table)
        console.print(
            f"The answer came at {speed:.1f} tokens/s, without torch.compile (--enforce-eager)."
        )


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: with its server."""

    def unwind(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {sign: signal.signal(sign, unwind) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _main(model: str, memory_bytes: str, max_model_len: str) -> None:
    """Print how many tokens of bf16 cache fit, as `PLANNED` reads it."""
    from kivi_vllm.attention.hooks.capacity import capacity

    plan = capacity(model, "auto", int(memory_bytes), int(max_model_len), dtype="bfloat16")
    print(f"bf16 tokens: {plan.tokens}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
