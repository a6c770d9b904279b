"""How long a soak is: short in the default suite, long by `make soak`."""

from __future__ import annotations

import os
import random

REQUESTS = int(os.environ.get("KIVI_SOAK_REQUESTS", "300"))
"""Requests of each storm."""

SECONDS = float(os.environ.get("KIVI_SOAK_SECONDS", "90"))
"""After so long a storm sends no more requests, and finishes those that it has sent."""

LONG = REQUESTS >= 1000
"""All configurations, all kills."""

SEED = int(
    os.environ.get("KIVI_SOAK_SEED", random.SystemRandom().randrange(1 << 31) if LONG else 0)
)
"""Of everything that is random; in every report and every failure."""
