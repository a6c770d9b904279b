"""Results that are written to files: their folders, and JSON that is never half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kivi_vllm.cli.errors import UserError


def check_folder(option: str, path: Path | None) -> None:
    """Refuse an option's path whose folder is not there, before anything slow begins."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}", "create it")


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; without a path, nothing."""
    if path is None:
        return
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)
