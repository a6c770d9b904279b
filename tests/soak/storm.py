"""A storm of requests upon an engine whose cache is too small, every answer checked as it comes."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.engine import VOCAB, Answer, answer, sampling
from tests.invariance.conftest import scheduler
from tests.soak.checks import audit, resident_bytes

MAX_TOKENS = 160
MAX_PROMPT = 700
TOLERANCE = 1e-4
"""Of log-probabilities, as in tests/invariance; 0 is what one sees, thanks to `exact_products` and
the heads of `engines.model`."""

AUDIT_EVERY = 50
"""Steps between two looks at all reference counts."""


def make_prompts(count: int, chance: random.Random) -> list[list[int]]:
    """`count` prompts of 1 to `MAX_PROMPT` tokens, most of which begin like others.

    A third of them repeat themselves, which is what n-gram drafts live on.
    """

    def noise(length: int) -> list[int]:
        return [chance.randrange(3, VOCAB) for _ in range(length)]

    stems = [noise(MAX_PROMPT) for _ in range(max(2, count // 12))]
    prompts = []
    for _ in range(count):
        stem = chance.choice(stems)[: chance.choice((0, 128, 256, chance.randrange(MAX_PROMPT)))]
        own = noise(chance.choice((1, 5, 60, 127, 128, 129, chance.randrange(1, 300))))
        if chance.random() < 1 / 3:
            motif = own[:7]
            own = (motif * (len(own) // len(motif) + 1))[: len(own)]
        prompts.append((stem + own)[:MAX_PROMPT])
    return prompts


@dataclass
class Sent:
    """A request on its way."""

    prompt: int
    max_tokens: int


class Storm:
    """Sends requests in waves, cancels some, and compares the others with the quiet answers.

    `counts` says what happened. Everything is drawn from `seed`, and the engine runs in
    this very thread: a storm that is not cut short by its `seconds` repeats itself exactly.
    """

    def __init__(
        self, llm: Any, prompts: Sequence[list[int]], truth: Sequence[Answer], seed: int
    ) -> None:
        self.engine = llm.llm_engine
        self.scheduler = scheduler(llm)
        self.prompts = prompts
        self.truth = truth
        self.chance = random.Random(seed)
        self.sent: dict[str, Sent] = {}
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.rss: list[int] = []
        self.choice: Sequence[int] = ()
        self._count_calls()

    def _count_calls(self) -> None:
        """Count preemptions and drafts, which no output tells of."""
        preempt = self.scheduler._preempt_request
        drafted = self.scheduler.make_spec_decoding_stats

        def counted_preempt(*args: Any, **kwargs: Any) -> Any:
            self.counts["preemptions"] += 1
            return preempt(*args, **kwargs)

        def counted_drafts(stats: Any, *, num_draft_tokens: int, **kwargs: Any) -> Any:
            self.counts["drafts"] += num_draft_tokens
            self.counts["drafts accepted"] += kwargs["num_accepted_tokens"]
            return drafted(stats, num_draft_tokens=num_draft_tokens, **kwargs)

        self.scheduler._preempt_request = counted_preempt
        self.scheduler.make_spec_decoding_stats = counted_drafts

    def report(self) -> str:
        """What happened, and how far the answers were from the quiet ones at the most."""
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(self.counts.items()))
        return f"{counts}, largest difference of a log-probability: {self.worst:.1e}"

    def run(
        self, requests: int, seconds: float, each_step: Callable[[], None] = lambda: None
    ) -> None:
        """Send `requests` requests, or as many as `seconds` allow, and wait for their answers.

        Raises:
            AssertionError: a wrong or a failed answer, or a page whose references are
                not those of its holders.

        """
        end = time.monotonic() + seconds
        chunks = [48, 100, 128, self.scheduler.max_num_scheduled_tokens]
        crowd = 1
        while True:
            open_ = self.counts["requests"] < requests and time.monotonic() < end
            if not open_ and not self.engine.has_unfinished_requests():
                break
            if self.counts["steps"] % 40 == 0:
                crowd = self._wave()
                self.scheduler.max_num_scheduled_tokens = self.chance.choice(chunks)
            while open_ and len(self.sent) < crowd and self.counts["requests"] < requests:
                self._send()
            states = self._by_state()
            # Few requests are seen in prefill: a step computes most prompts whole.
            if states and self.chance.random() < (0.3 if "in prefill" in states else 0.05):
                self._cancel(states)
            each_step()
            for output in self.engine.step():
                self._receive(output)
            self.counts["steps"] += 1
            if self.counts["steps"] % AUDIT_EVERY == 0:
                audit(self.scheduler)
        self.scheduler.max_num_scheduled_tokens = chunks[-1]

    def _wave(self) -> int:
        """Begin another wave: how many requests are on their way, and which.

        Many short prompts find room together and outgrow it together: that makes for
        preemptions. Long ones wait for each other.
        """
        indices = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        self.choice = self.chance.choice((indices, indices[: len(indices) // 8]))
        return self.chance.choice((1, 6, 20, 40))

    def _send(self) -> None:
        name = f"r{self.counts['requests']}"
        sent = Sent(self.chance.choice(self.choice), self.chance.randint(1, MAX_TOKENS))
        tokens = {"prompt_token_ids": list(self.prompts[sent.prompt])}
        self.engine.add_request(name, tokens, sampling(sent.max_tokens))
        self.sent[name] = sent
        self.counts["requests"] += 1

    def _by_state(self) -> dict[str, list[str]]:
        by_state: dict[str, list[str]] = {}
        for name in self.sent:
            by_state.setdefault(self._state(name), []).append(name)
        return by_state

    def _cancel(self, by_state: dict[str, list[str]]) -> None:
        """Cancel a request in the state in which fewest have been cancelled so far."""
        state = min(sorted(by_state), key=lambda state: self.counts[f"cancelled {state}"])
        name = self.chance.choice(by_state[state])
        self.engine.abort_request([name])
        del self.sent[name]
        self._done(f"cancelled {state}")

    def _state(self, name: str) -> str:
        request = self._request(name)
        if request.status.name == "PREEMPTED":
            return "while preempted"
        if request.status.name != "RUNNING":
            return "before its first step"
        prefill = request.num_computed_tokens < request.num_prompt_tokens
        return "in prefill" if prefill else "in decode"

    def _request(self, name: str) -> Any:
        (internal,) = self.engine.output_processor.external_req_ids[name]
        return self.scheduler.requests[internal]

    def _receive(self, output: Any) -> None:
        if not output.finished:
            return
        sent = self.sent.pop(output.request_id)
        got, want = answer(output), self.truth[sent.prompt]
        reason = output.outputs[0].finish_reason
        assert reason == "length", f"{output.request_id} failed: {reason}"
        short = Answer(want.tokens[: sent.max_tokens], want.logprobs[: sent.max_tokens])
        self.worst = max(self.worst, got.difference(short))
        assert self.worst <= TOLERANCE, (
            f"{output.request_id} (prompt {sent.prompt}) differs from its quiet answer:\n"
            f"{got}\n{short}"
        )
        self.counts["generated tokens"] += len(got.tokens)
        self.counts["tokens hit"] += got.num_cached_tokens
        self.counts["requests with a hit"] += got.num_cached_tokens > 0
        self._done("finished")

    def _done(self, how: str) -> None:
        """Count a request that is over; look at the memory every now and then."""
        self.counts[how] += 1
        self.counts["over"] += 1
        if self.counts["over"] % 25 == 0:
            self.rss.append(resident_bytes())
