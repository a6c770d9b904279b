"""How the measuring process tells the command what happens: a JSON object a line, in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kivi_vllm.cli.errors import UserError

Say = Callable[[str, Any], None]


def reporting(
    measure: Callable[[dict[str, Any], Say], None], request: dict[str, Any], events: Path
) -> None:
    """Run `measure` with a function that reports an event; a `UserError` is one too."""
    with events.open("w", buffering=1) as file:

        def say(kind: str, what: Any) -> None:
            file.write(json.dumps({kind: what}) + "\n")

        try:
            measure(request, say)
        except UserError as error:
            say("error", [str(error), error.remedy])
            sys.exit(1)
