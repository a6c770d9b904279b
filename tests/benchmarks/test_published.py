"""Every published table is the one that its JSON file gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pandas")

from benchmarks import published, tables

FOUND = {path: tables.MARKED.findall(path.read_text()) for path in tables.DOCUMENTS}


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.parent.name)
def test_documents_show_what_the_files_hold(path: Path) -> None:
    text = path.read_text()
    assert tables.rewritten(text) == text, "run `python -m benchmarks.tables --write`"


def test_every_marker_is_closed_and_every_table_stands_somewhere() -> None:
    shown = []
    for path, found in FOUND.items():
        names = [name for _, name, _ in found]
        assert len(names) == len(re.findall("<!-- (table|figure):", path.read_text())) > 0, path
        shown += names
    assert "load" in [name for _, name, _ in FOUND[tables.DOCUMENTS[1]]]
    assert set(shown) == set(tables.TABLES) | set(tables.FIGURES)


def test_a_changed_digit_is_noticed() -> None:
    """The negative control: in every table and figure, the last digit of all."""
    for found in tables.MARKED.finditer("".join(path.read_text() for path in tables.DOCUMENTS)):
        at = max(m.start() for m in re.finditer(r"\d", found[0]))
        wrong = found[0][:at] + str((int(found[0][at]) + 1) % 10) + found[0][at + 1 :]
        assert tables.rewritten(wrong) == found[0] != wrong


def test_a_changed_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other negative control: the same table over a file with another number."""
    for file in published.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "serving-cpu-kivi.json"
    data = json.loads(path.read_text())
    (kivi2,) = (one for one in data["summary"] if one["kv_cache_dtype"] == "kivi2")
    kivi2["running_while_others_wait"] += 1
    path.write_text(json.dumps(data))
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    for document in tables.DOCUMENTS[1:3]:  # those with tables of loads
        assert tables.rewritten(document.read_text()) != document.read_text()


def test_concurrency_is_the_median_while_others_wait() -> None:
    """Of the load of KIVI's lengths, by hand from the file."""
    rows = json.loads((published.RESULTS / "serving-cpu-kivi.json").read_text())["rows"]
    server = {row["kv_cache_dtype"]: row["server"] for row in rows}
    assert [server[name]["running_while_others_wait"] for name in server] == [27, 50, 61]
    assert [server[name]["running_max"] for name in server] == [53, 72, 72]
    lines = [line.split(" | ") for line in published.markdown(tables.load()).splitlines()]
    (at,) = (i for i, line in enumerate(lines) if "KIVI" in line[0])
    assert lines[at][1:] == [tables.WAITING, "27", "50 (1.85×)", "61 (2.26×) |"]
    assert lines[at + 1][1:] == [tables.MOST, "53", "72 (1.36×), all", "72 (1.36×), all |"]


def test_the_command_prints_every_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables"],
        capture_output=True, text=True, check=True, cwd=tables.ROOT, timeout=120,
    )  # fmt: skip
    assert all(f"\n{name}\n" in f"\n{done.stdout}" for name in tables.TABLES)
