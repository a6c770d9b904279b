"""`kivi-vllm demo`: serve a small model with the 2-bit cache, ask it something, show the gain."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kivi_vllm import toolchain
from kivi_vllm.cli.default_model import cache_folder, default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, stop
from kivi_vllm.cli.progress import note, step
from kivi_vllm.cli.server import Server, free_port, serve_command, serve_environment

QUESTION = "Why is the sky blue? Answer in two sentences."

MakeCommand = Callable[[Path, str, int, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Demo:
    """What to show.

    Args:
        model: folder of a model; None for the default model.
        question: what to ask.
        max_tokens: length limit of the answer.
        kv_cache_dtype: the cache format to compare with bf16.
        memory_mib: memory of the KV cache in either run.
        max_model_len: longest sequence in either run.
        timeout: seconds that a server may take to start; the first torch.compile is slow.
        keep_log: keep the servers' logs after success.
        command: makes a server's command line from model, dtype, port and options.
    """

    model: Path | None = None
    question: str = QUESTION
    max_tokens: int = 64
    kv_cache_dtype: str = "kivi2"
    memory_mib: int = 256
    max_model_len: int = 4096
    timeout: float = 900.0
    keep_log: bool = False
    command: MakeCommand = serve_command

    def run(self) -> None:
        """Run it; the last line on stdout is the result as one JSON object."""
        with _termination_unwinds():
            model = self._model()
            options = [
                *("--dtype", "bfloat16", "--max-model-len", str(self.max_model_len)),
                *("--kv-cache-memory-bytes", str(self.memory_mib << 20)),
            ]
            bf16 = self._capacity_bf16(model, [*options, "--enforce-eager"])
            if not toolchain.has_python_headers():
                note("No Python.h, which torch.compile needs: serving with --enforce-eager.")
                options.append("--enforce-eager")
            tokens, answer, speed = self._serve(model, options)
        self._report(bf16, tokens, speed)
        result = {
            "answer": answer,
            "kv_tokens_bf16": bf16,
            "kv_tokens_kivi2": tokens,
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

    def _capacity_bf16(self, model: Path, options: Sequence[str]) -> int:
        """Start vLLM with its own bf16 cache, only for what it says about the cache's size."""
        title = f"vLLM with a bf16 cache: how many tokens do {self.memory_mib} MiB hold?"
        with self._server(model, "auto", options) as server, step(title) as update:
            tokens = server.wait_for_tokens(self.timeout, update)
            # Until it is ready it does not heed SIGTERM.
            server.wait_until_healthy(self.timeout, update)
        return tokens

    def _serve(self, model: Path, options: Sequence[str]) -> tuple[int, str, float]:
        """Serve with the quantized cache and ask; return its tokens, the answer and tokens/s."""
        title = f"vllm serve {model.name} --kv-cache-dtype {self.kv_cache_dtype}"
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
        console.print(f"A KV cache of {self.memory_mib} MiB, as vLLM reports it:")
        console.print(table)
        console.print(f"The answer came at {speed:.1f} tokens/s.")


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
