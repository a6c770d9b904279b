"""A whole engine: throughput, where its time goes, and what fits."""

from benchmarks.common.command import require

require("pandas")
