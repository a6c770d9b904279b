"""A refusal on vLLM's command line: one line that says what to do, and no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from kivi_vllm.config import DTYPES
from tests.engine import VOCAB
from tests.refusals.configs import config_only

# What `vllm serve` imports is imported once; each command line is a fork of that process.
FORKS = """
import json, os, sys
import vllm.entrypoints.openai.api_server
from vllm.entrypoints.cli.main import main
for arguments in json.loads(sys.argv[1]):
    if not os.fork():
        sys.argv = ["vllm", *arguments]
        main()
        sys.exit()
    _, status = os.wait()
    print(f"STATUS {os.waitstatus_to_exitcode(status)}", flush=True)
"""


def _run(*command: str) -> tuple[int, str]:
    """Exit status and output of a Python command that must not get far."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def _error(status: int, output: str) -> str:
    """The last line that such a command says, with all its reasons."""
    assert status != 0, output
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("error:")]
    assert output.rstrip().endswith(line)
    return line


def test_serve() -> None:
    model = config_only()
    commands = [
        ["--kv-cache-dtype", "kivi2", "--block-size", "64"],
        # The option is found first; the memory needs it.
        [
            *("--kv-cache-dtype", "kivi2", "--kv-cache-memory-bytes", "65536"),
            *("--additional-config", '{"kivi": {"sink_tokens": 3}}'),
        ],
        ["--kv-cache-dtype", "kivi_k4v2"],
        ["--kv-cache-dtype", "kivi_k2v3"],
    ]
    done, output = _run("-c", FORKS, json.dumps([["serve", model, *c] for c in commands]))
    *outputs, rest = re.split(r"^STATUS (\d+)\n", output, flags=re.MULTILINE)
    assert (done, rest, len(outputs)) == (0, "", 2 * len(commands)), output
    setting, option, former, dtype = zip(map(int, outputs[1::2]), outputs[::2], strict=True)

    assert _error(*setting) == (
        "error: --kv-cache-dtype kivi2: --block-size 64 is not supported: pages hold 128 tokens; "
        "leave --block-size out"
    )
    assert _error(*option) == "error: kivi.sink_tokens is 3, but must be one of: 0, 4, 8, 16"
    assert _error(*former) == (
        "error: --kv-cache-dtype kivi_k4v2 is no more; use kivi_k4v3, which takes fewer bytes and "
        "loses less"
    )
    status, output = dtype
    assert status == 2
    assert "Traceback" not in output
    line = output.splitlines()[-1]
    assert "invalid choice: 'kivi_k2v3'" in line
    assert all(name in line for name in DTYPES)


def _with_tokenizer(model: str) -> str:
    """The same model with a tokenizer of numbers beside it: the benchmark reads it first."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", eos_token="2")
    fast.save_pretrained(model)
    return model


@pytest.mark.slow
def test_offline_command_with_too_little_memory() -> None:
    done = _run(
        *("-m", "vllm.entrypoints.cli.main", "bench", "throughput", "--kv-cache-dtype", "kivi2"),
        *("--model", _with_tokenizer(config_only())),
        *("--kv-cache-memory-bytes", "65536", "--max-model-len", "1024", "--num-prompts", "1"),
        *("--input-len", "16", "--output-len", "4", "--dataset-name", "random"),
    )
    line = _error(*done)
    assert line.startswith("error: --kv-cache-dtype kivi2: one sequence of --max-model-len 1024")
    assert "raise --kv-cache-memory-bytes" in line
