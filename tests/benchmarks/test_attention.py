"""`benchmarks/attention` without a GPU: mistakes, processes that break, tables and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.attention import children, report
from benchmarks.attention.cases import Case
from kivi_vllm.cli.errors import UserError
from tests.benchmarks import stub_contenders

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CASES = [Case("decode", "tiny", 256, batch) for batch in (1, 2, 3)]
SETTINGS = {"smoke": False, "deadline": 0.0}


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setattr(children, "_gpu", stub_contenders.measure)
    monkeypatch.setattr(children, "SILENCE_S", 3.0)
    return []


def test_others_go_on_without_a_contender_that_breaks(told: list[tuple[str, Any]]) -> None:
    """One crashes, one hangs, one fails: each once, in a process of its own."""
    children.on_gpu(CASES, SETTINGS, lambda *event: told.append(event))
    first, second, third = (what for kind, what in told if kind == "row")
    assert [first["batch"], second["batch"], third["batch"]] == [1, 2, 3]
    assert first["ran"] == third["ran"] == ["good"]
    assert set(first["without"]) == {"crashing", "hanging", "failing"}
    assert "status -11" in first["without"]["crashing"]
    assert "no news for 3 s" in first["without"]["hanging"]
    assert "illegal memory access" in first["without"]["failing"]
    assert "no contender is to blame" in second["skipped"]
    ended = [what for kind, what in told if kind == "now" and "the process ended" in what]
    assert [line.partition("ended ")[2] for line in ended] == [
        "(crashing)", "(hanging)", "(failing)", "(nothing in particular)",
    ]  # fmt: skip


@pytest.mark.parametrize(("how", "word"), [("no_gpu", "finds no GPU"), ("broken", "no driver")])
def test_what_breaks_before_the_first_case_ends_the_run(
    told: list[tuple[str, Any]], how: str, word: str
) -> None:
    with pytest.raises(UserError, match=word):
        children.on_gpu(CASES, SETTINGS | {how: True}, lambda *event: told.append(event))
    assert not told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "gpt"], ["--shape gpt", "smollm2"]),
        (["--device", "tpu"], ["--device tpu", "cuda"]),
        (["--context", "1000"], ["1000 cached tokens", "multiple of 128"]),
        (["--prefill", "x+1"], ["--prefill 'x+1'", "2048+8192"]),
        (["--seconds", "10"], ["--seconds", "cuda"]),
        (["--threads", "100000"], ["--threads 100000", "fewer"]),
        (["--json", "/no/such/folder/x.json"], ["/no/such/folder"]),
    ],
)
def test_mistakes_show_before_anything_is_timed(arguments: list[str], words: list[str]) -> None:
    done = run("benchmarks.attention", *arguments)
    assert done.returncode == 2
    for word in [*words, "remedy:"]:
        assert word in done.stderr


def test_checkouts_are_refused_before_they_are_measured(tmp_path: Path) -> None:
    for contenders, word in (
        ([f"{tmp_path}:kivi2", f"{ROOT}:kivi2"], "is no checkout"),
        ([f"{ROOT}:kivi2"], "nothing to be compared"),
        ([f"{ROOT}:kivi2", f"{ROOT}:kivi2"], "are the same"),
    ):
        done = run("benchmarks.attention.builds", *contenders)
        assert done.returncode == 2 and word in done.stderr


@pytest.mark.slow
def test_checkouts_are_measured_in_turn(tmp_path: Path) -> None:
    contenders = [f"{ROOT}:kivi_k3v2", f"{ROOT}:kivi2_paper"]
    options = ["--shape", "llama3-8b", "--context", "512", "--seconds", "0.1"]
    path = tmp_path / "builds.json"
    done = run("benchmarks.attention.builds", *contenders, *options, "--json", str(path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert [row["0_name"], row["1_name"]] == contenders and row["0_ratio"] == 1
    assert row["rounds"] >= 9 and row["1_ratio"] == pytest.approx(
        row["1_ms"] / row["0_ms"], rel=0.5
    )


@pytest.mark.slow
def test_a_checkout_that_fails_is_named_by_its_error() -> None:
    done = run(
        "benchmarks.attention.builds", f"{ROOT}:kivi_raw", f"{ROOT}:kivi2", "--shape", "tiny"
    )
    assert done.returncode == 1 and "KeyError: 'kivi_raw'" in done.stderr


@pytest.mark.parametrize("name", ["attention-cpu-avx512-1-thread", "attention-cpu-avx2-2-threads"])
def test_published_files_are_shown_and_drawn(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files' schema is the one that is read."""
    data = json.loads((RESULTS / f"{name}.json").read_text())
    skipped = data["decode"][0] | {"skipped": "no room for it"}
    rows = {section: data[section] for section in ("decode", "prefill", "store")}
    rows["decode"] = [*rows["decode"], {key: skipped[key] for key in (*report.KEYS, "skipped")}]
    report.show(rows, {"device": "cpu"})
    shown = capsys.readouterr().out
    assert f"{data['decode'][5]['ratio_bf16']:.2f}×" in shown and "no room for it" in shown
    pytest.importorskip("matplotlib")
    done = run("benchmarks.attention.plot", f"{RESULTS}/{name}.json", "-o", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    shapes = ("smollm2", "llama3-8b", "llama2-7b")
    expected = {f"p-{shape}-{kind}" for shape in shapes for kind in ("time", "speedup")}
    assert {path.stem for path in tmp_path.iterdir()} == expected


def test_what_budgets_bring_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    published, path = RESULTS / "selection-cpu-avx512.json", tmp_path / "x.json"
    done = run("benchmarks.attention.plot", str(published), "-o", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    svg = (tmp_path / "p-llama3-8b-1-1-selection.svg").read_text()
    wanted = ("kivi2", "kivi_k3v2", "dense", "token_budget 1024", "token_budget 4096", "128k")
    assert all(f"<!-- {name} -->" in svg for name in wanted)
    path.write_text(json.dumps({"header": {}, "selection": [{"skipped": "all"}]}))
    done = run("benchmarks.attention.plot", str(path))
    assert done.returncode == 1 and "no selection was measured" in done.stderr


def test_a_file_without_rows_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"header": {}, "decode": [{"skipped": "all"}]}))
    done = run("benchmarks.attention.plot", str(path))
    assert done.returncode == 1 and "no decode rows" in done.stderr


def test_a_gpus_rows_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Sorted by shape and case; what is missing is a dash; others by name; why they are missing."""
    base = {"section": "decode", "shape": "tiny", "context": 256, "new": 1, "rel_error": 1e-3}
    base |= {"bf16_ms": 2.0, "bf16_is": "flash_bf16", "fp8_is": None, "ratio_bf16": 4.0}
    more = {"kivi2_ms": 0.5, "iterations": 7, "share_of_bandwidth": 0.5, "kivi4_ms": None}
    lacking = {"turboquant": "no room: 9 GiB", "flashinfer_bf16": "ModuleNotFoundError: flashinfer"}
    rows = {"decode": [base | more | {"batch": b, "unavailable": lacking} for b in (8, 1)]}
    report.show(rows | {"prefill": [], "store": []}, {"device": "cuda"})
    shown = capsys.readouterr().out
    assert "flash " in shown and "4.00×" in shown and "50.0%" in shown
    assert shown.index(" 1 ") < shown.index(" 8 ")
    assert "no room for turboquant" in shown and "without flashinfer_bf16" in shown
