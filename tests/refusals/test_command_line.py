"""A refusal on vLLM's command line: one line that says what to do, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

from kivi_vllm.config import DTYPES
from tests.engine import VOCAB
from tests.refusals.configs import config_only


def _vllm(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a `vllm` command that must not get far."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def _error(*arguments: str) -> str:
    """The last line that such a command says, with all its reasons."""
    status, output = _vllm(*arguments)
    assert status not in (0, None), output
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("error:")]
    assert output.rstrip().endswith(line)
    return line


def test_serve_with_a_setting_that_is_not_supported() -> None:
    line = _error("serve", config_only(), "--kv-cache-dtype", "kivi2", "--block-size", "64")
    assert line == (
        "error: --kv-cache-dtype kivi2: --block-size 64 is not supported: pages hold 128 tokens; "
        "leave --block-size out"
    )


def test_serve_with_a_wrong_option_and_little_memory() -> None:
    # The option is found first; the memory needs it.
    line = _error(
        *("serve", config_only(), "--kv-cache-dtype", "kivi2"),
        *("--kv-cache-memory-bytes", "65536"),
        *("--additional-config", '{"kivi": {"group_size": 33}}'),
    )
    assert line == "error: kivi.group_size is 33, but must be one of: 32, 64, 128"


def test_serve_with_an_unknown_dtype() -> None:
    status, output = _vllm("serve", config_only(), "--kv-cache-dtype", "kivi3")
    assert status == 2
    assert "Traceback" not in output
    line = output.splitlines()[-1]
    assert "invalid choice: 'kivi3'" in line
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


def test_offline_command_with_too_little_memory() -> None:
    line = _error(
        *("bench", "throughput", "--kv-cache-dtype", "kivi2"),
        *("--model", _with_tokenizer(config_only())),
        *("--kv-cache-memory-bytes", "65536", "--max-model-len", "1024", "--num-prompts", "1"),
        *("--input-len", "16", "--output-len", "4", "--dataset-name", "random"),
    )
    assert line.startswith("error: --kv-cache-dtype kivi2: one sequence of --max-model-len 1024")
    assert "raise --kv-cache-memory-bytes" in line
