"""A tiny model served by `vllm serve`, its clients, and what its processes hold."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.process import members, running
from kivi_vllm.cli.server import Server, serve_command, serve_environment
from tests.soak.engines import model

START_S = 300.0
REPLY_S = 120.0
OPTIONS = {
    "--dtype": "float32",
    "--max-model-len": "768",
    "--kv-cache-memory-bytes": str(50 * 12288),  # 50 pages
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "256",
    "--additional-config": json.dumps({"kivi": {"prefill": "cached"}}),
}
NEAR_TIE = 0.05
"""Two tokens whose log-probabilities are so near may change places.

Here the matrix products are the served ones, in fp32: a crowd rounds them otherwise than one
request alone does, which moves a code of the cache now and then.
"""


@dataclass(frozen=True)
class Reply:
    """Tokens of one answer, and by how much each led the second choice (log-probabilities)."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...]

    def agrees(self, other: Reply) -> int:
        """The number of tokens up to the first difference."""
        pairs = enumerate(zip(self.tokens, other.tokens, strict=True))
        return next((i for i, (a, b) in pairs if a != b), len(self.tokens))


class Client:
    """Greedy completions of token ids from a server on the loopback address."""

    def __init__(self, port: int) -> None:
        from openai import OpenAI

        # No second try: what fails shall be seen.
        url = f"http://127.0.0.1:{port}/v1"
        self._openai = OpenAI(base_url=url, api_key="none", timeout=REPLY_S, max_retries=0)

    def ask(self, prompt: Sequence[int], tokens: int, cancel_after: int = 0) -> Reply | None:
        """The answer of `tokens` tokens; None if cancelled after some of them.

        Raises:
            openai.APIError, httpx.HTTPError: the server failed.
            AssertionError: the answer ended too early, as if nothing were wrong.

        """
        extra = dict(ignore_eos=True, return_token_ids=True, return_tokens_as_token_ids=True)
        stream = self._openai.completions.create(
            model=Path(model()).name,
            prompt=list(prompt),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            logprobs=2,
            extra_body=extra,
        )
        ids: list[int] = []
        leads: list[float] = []
        reason = None
        for chunk in stream:
            choice = chunk.choices[0]
            ids += choice.token_ids or []
            for top in choice.logprobs.top_logprobs if choice.logprobs else []:
                first, second = sorted(top.values(), reverse=True)[:2]
                leads.append(first - second)
            reason = choice.finish_reason
            if cancel_after and len(ids) >= cancel_after:
                stream.close()
                return None
        assert reason == "length" and len(ids) == tokens, f"{len(ids)} of {tokens} tokens: {reason}"
        assert len(leads) == tokens
        return Reply(tuple(ids), tuple(leads))


@contextmanager
def serving(log: Path, port: int) -> Iterator[Server]:
    """`vllm serve --kv-cache-dtype kivi2` with a cache too small, healthy."""
    options = [text for pair in OPTIONS.items() for text in pair]
    options += ["--enforce-eager", "--skip-tokenizer-init"]
    environment = serve_environment(cache_folder())
    # The other tests look into the engine; nobody does here.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = serve_command(Path(model()), "kivi2", port, options)
    with running(command, log, environment) as process:
        server = Server(process, log, port)
        server.wait_until_healthy(START_S, lambda text: None)
        yield server


class Crowd:
    """Threads that ask and cancel until they are stopped or the server fails them.

    `counts`: answered, cancelled and lost requests; tokens of the answers, and how many of them
    are equal to the quiet ones before a near tie leads elsewhere. `widest_tie` is the widest such.
    """

    def __init__(
        self, port: int, prompts: Sequence[Sequence[int]], truth: Sequence[Reply], seed: int
    ) -> None:
        self.port, self.prompts, self.truth, self.seed = port, prompts, truth, seed
        self.counts: Counter[str] = Counter()
        self.widest_tie = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @contextmanager
    def asking(self, threads: int = 16) -> Iterator[None]:
        """Ask in the background; on leaving, wait for the last reply or failure."""
        with ThreadPoolExecutor(threads) as pool:
            asked = [pool.submit(self._ask, self.seed + i) for i in range(threads)]
            try:
                yield
            finally:
                self._stopped.set()
            for future in asked:
                future.result()

    def wait_for(self, replies: int) -> None:
        """Wait until so many requests are over."""
        end = time.monotonic() + START_S
        while self.counts["answered"] + self.counts["cancelled"] < replies:
            assert time.monotonic() < end, f"too slow: {self.counts}"
            assert not self.counts["lost"], f"requests failed: {self.counts}"
            time.sleep(0.02)

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def _ask(self, seed: int) -> None:
        import httpx
        from openai import APIError

        client, chance = Client(self.port), random.Random(seed)
        while not self._stopped.is_set():
            index = chance.randrange(len(self.prompts))
            tokens = len(self.truth[index].tokens)
            cancel = chance.choice((0, 0, chance.randrange(1, tokens)))
            try:
                reply = client.ask(self.prompts[index], tokens, cancel)
            except (APIError, httpx.HTTPError):
                self._count(lost=1)
                return
            if reply is None:
                self._count(cancelled=1)
                continue
            truth = self.truth[index]
            same = truth.agrees(reply)
            self._count(answered=1, tokens=tokens, equal=same)
            if same < tokens:
                with self._lock:
                    self.widest_tie = max(self.widest_tie, truth.leads[same])
                assert truth.leads[same] < NEAR_TIE, (
                    f"prompt {index}, token {same}: {reply} in a crowd, {truth} alone"
                )


def named(session: int, name: str) -> list[int]:
    """The session's processes of that name (of which Linux keeps 15 characters)."""
    return [
        pid for pid in members(session) if Path(f"/proc/{pid}/comm").read_text()[:-1] == name[:15]
    ]


def shared_memory(session: int) -> set[Path]:
    """Files of /dev/shm that the session's processes have mapped."""
    lines = (
        line.split(maxsplit=5)[-1].strip()
        for pid in members(session)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
    )
    return {Path(name) for name in lines if name.startswith("/dev/shm/") and "deleted" not in name}
