"""`benchmarks/quality`: mistakes show before any engine starts; pictures of a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.files import write_json
from benchmarks.quality import __main__ as cli
from benchmarks.quality import engine, plot, report
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.sections import SECTIONS, Workload
from kivi_vllm.cli.errors import UserError
from tests.engine import tiny_model
from tests.evaluation.tokenizers import bytes_tokenizer

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    bytes_tokenizer(folder)
    (folder / "config.json").write_bytes((Path(tiny_model()) / "config.json").read_bytes())
    return str(folder)


DEFAULTS: dict[str, Any] = dict(
    cache=["auto", "kivi2"],
    text=None,
    section=None,
    fact=None,
    lengths="1024",
    fraction=0.1,
    dtype="auto",
    kv_cache_memory_bytes=None,
    seed=0,
    json_path=None,
    plots=None,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cache=["auto", "kivi5"]), "no cache dtype 'kivi5'"),
        (dict(cache=["simulated:kivi2"]), "cannot be the reference"),
        (dict(text=["nothing.txt"]), "--text nothing.txt cannot be read"),
        (dict(section=["perplexety"]), "--section perplexety"),
        (dict(fact=["needles"]), "--fact needles"),
        (dict(lengths="1k"), "--lengths 1k"),
        (dict(lengths="8"), "--lengths 8"),
        (dict(lengths="1024,8192"), "--lengths 8192: the model's limit is 4096"),
        (dict(lengths="4096", fraction=30), "less than 240 windows of 4,096"),
        (dict(fraction=0), "--fraction 0"),
        (dict(dtype="int8"), "--dtype int8"),
        (dict(json_path=Path("/no/such/folder/a.json")), "no folder"),
        (dict(plots=Path("/no/such/folder/a")), "no folder"),
        (dict(model="/no/such/model"), "no folder of a decoder model"),
    ],
)
def test_mistakes_show_before_any_engine_starts(
    model: str,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.Child, "__init__", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(UserError, match=message) as found:
        cli.quality(**{"model": model, **DEFAULTS, **changes})
    assert found.value.remedy


def test_workload(model: str) -> None:
    work = Workload.make(
        model,
        ("perplexity", "passkey", "generation"),
        texts=["pydoc"],
        lengths=[600, 512],
        kinds=["passkey"],
        fraction=0.25,
        limit=4096,
        seed=0,
    )
    assert work.lengths == (512, 600)
    assert [len(window) for window in work.windows["pydoc"]] == [600] * 2
    assert len(work.cases) == 2 * 5 * 2
    assert [len(prompt) for prompt in work.prompts["pydoc"]] == [512] * 4
    assert work.max_model_len == 1024, "the long answers are longer than the lengths"


def _result(name: str, size: float, kl: float) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, float]:
        return dict(value=value, low=value * 0.9, high=value * 1.1)

    return dict(
        caches=[dict(name=name, kv_bytes_per_token=size)],
        perplexity=[
            dict(
                cache=name,
                text="pydoc",
                length=length,
                tokens=100,
                perplexity=9.0 + kl,
                perplexity_reference=9.0,
                ratio=estimate(1 + kl),
                kl=estimate(kl * length / 1024),
                top1=estimate(1 - kl),
            )
            for length in (1024, 2048)
        ],
        passkey=[
            dict(cache=name, text="pydoc", length=1024, depth=d, kind="passkey", correct=d < 0.6)
            for d in (0.1, 0.5, 0.9)
        ],
        generation=[
            dict(
                cache=name,
                text="pydoc",
                prompts=2,
                tokens=512,
                median_divergence=37.5,
                mean_agreement=0.25,
                identical=1,
            )
        ],
    )


def _document(*results: dict[str, Any]) -> dict[str, Any]:
    header = {"model": {"name": "m", "dtype": "float32"}, "dtype": "float32"}
    names = ("caches", *SECTIONS)
    return {"header": header, **{n: [one for part in results for one in part[n]] for n in names}}


RESULTS = [_result("auto", 46080, 0.0), _result("kivi2", 4320, 0.2)]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(_document(*RESULTS))
    said = capsys.readouterr().out
    for piece in ("512–1,024", "1,024–2,048", "4,320", "1.200 (1.080–1.320)", "80.0%", "1/1"):
        assert piece in said
    for piece in ("0/1", "2/3", "25.0%", "1/2"):
        assert piece in said


def test_the_document(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of all rows by section; a row that fails is named there, and the others go on."""

    def measure(row: CacheRow, *_: Any) -> dict[str, Any]:
        if row.name == "kivi4":
            raise UserError("it broke", "mend it")
        return next(results)

    path, results = tmp_path / "a.json", iter(RESULTS)
    monkeypatch.setattr(cli, "measure", measure)
    changes = dict(cache=["auto", "kivi4", "kivi2"], lengths="512", json_path=path)
    with pytest.raises(UserError, match="kivi4: it broke"):
        cli.quality(model, **{**DEFAULTS, **changes})
    data = json.loads(path.read_text())
    sizes = [len(data[name]) for name in ("caches", "perplexity", "passkey", "generation")]
    assert sizes == [2, 4, 6, 2]
    assert data["header"]["failed"] == {"kivi4": "it broke"}
    assert data["header"]["model"]["limit"] == 4096
    assert "kivi4 failed" in capsys.readouterr().err


def test_picture_of_budgets(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.plot(PUBLISHED / "quality-budget.json", tmp_path / "p")
    assert {one.name for one in tmp_path.iterdir()} == {"p-budgets.png", "p-budgets.svg"}
    svg = (tmp_path / "p-budgets.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("1,024", "2,048", "pydoc, 8,192 tokens"))


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "q.json"
    write_json(path, _document(*RESULTS))
    before = tmp_path / "b.json"
    write_json(before, _document(_result("auto", 46080, 0.0), _result("kivi_k4v2", 5760, 0.01)))
    plot.plot(path, tmp_path / "p", before)
    names = {f"p-pydoc-{what}.{ending}" for what in ("kl", "size") for ending in ("png", "svg")}
    assert {one.name for one in tmp_path.iterdir()} == {"q.json", "b.json", *names}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    svg = (tmp_path / "p-pydoc-size.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("kivi2", "kivi_k4v2", "auto (16 bits): KL 0"))
    plot.plot(path, tmp_path / "p")
    assert "kivi_k4v2" not in (tmp_path / "p-pydoc-size.svg").read_text()
    with pytest.raises(UserError, match="no two rows"):
        write_json(path, _document(RESULTS[0]))
        plot.plot(path, tmp_path / "p")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"no result of benchmarks\.quality"):
        plot.plot(path, tmp_path / "p")
