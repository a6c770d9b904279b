"""What is checked first on a device notices what it is there for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention.gpu import canary
from kivi_vllm.cli.errors import UserError
from tests.triton.device import INTERPRETED


def checks(path: Path) -> dict[str, bool]:
    canary.canary(["tiny"], ["kivi2"], smoke=INTERPRETED, json_path=path)
    return {row["check"]: row["holds"] for row in json.loads(path.read_text())["rows"]}


def test_all_holds(tmp_path: Path) -> None:
    found = checks(tmp_path / "canary.json")
    assert found == dict.fromkeys(
        ("product of subnormals", "tiny kivi2: bytes", "tiny kivi2: attention"), True
    )


def test_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = canary.encode_pages

    def one_off(*args: Any) -> torch.Tensor:
        pages = exact(*args)
        pages[..., 7] ^= 1
        return pages

    monkeypatch.setattr(canary, "encode_pages", one_off)
    with pytest.raises(UserError, match="1 of 3 checks fail"):
        checks(tmp_path / "canary.json")
