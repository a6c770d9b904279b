"""A server under load, by cache dtype."""

from benchmarks.common.command import require

require("pandas")  # our tables, and what `vllm bench sweep` ends with
