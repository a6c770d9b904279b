"""The evaluations that KIVI and Quest publish, by cache dtype: see README.md here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks.common import machine
from benchmarks.quality.child_engine import Settings
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.tasks import compare, gsm8k, longbench, longbench_tasks, passkey, pg19
from benchmarks.quality.tasks.data import DataSet
from benchmarks.quality.tasks.items import Item, fitting_length
from benchmarks.quality.tasks.tokens import Tokens
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder
from kivi_vllm.cli.main import main
from kivi_vllm.cli.progress import note
from kivi_vllm.config import PrefillMode

CACHES = ["auto", "kivi2", "kivi4"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
]
CacheOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Repeatable: dtype[:option=value,...], such as kivi2:residual_length=32; the others "
        "are compared with the first. Default: auto, kivi2, kivi4.",
    ),
]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder of the data. Default: $KIVI_VLLM_CACHE/data/NAME.")
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch the data from a hub.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only a task's first items.")]
LengthOption = Annotated[
    int | None,
    typer.Option(min=128, help="Longest sequence. Default: what is needed."),
]
PrefillOption = Annotated[
    str | None,
    typer.Option(
        help="Mode of the KIVI dtypes: exact (the default, as in KIVI), or cached (the tokens of a "
        "prompt see each other as at decode)."
    ),
]
BytesOption = Annotated[
    int | None, typer.Option(min=1, help="Memory of the KV cache. Default: vLLM's.")
]
SeqsOption = Annotated[int, typer.Option(min=1, help="Sequences that run together.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Tokens of a step. Default: vLLM's.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Where to write settings, scores and all answers.")
]


@app.command("gsm8k")
def gsm8k_command(
    model: ModelArgument = None,
    cache: CacheOption = None,
    data: DataOption = None,
    download: DownloadOption = False,
    limit: LimitOption = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples, the train file's first.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = gsm8k.MAX_TOKENS,
    max_model_len: LengthOption = None,
    prefill: PrefillOption = None,
    kv_cache_memory_bytes: BytesOption = None,
    max_num_batched_tokens: BatchOption = None,
    max_num_seqs: SeqsOption = 8,
    json_path: JsonOption = None,
) -> None:
    """GSM8K, few-shot with a chain of thought: exact match of the number."""
    rows = _rows(cache, json_path, prefill)
    folder = _folder(gsm8k.DATA, data, download)
    train = gsm8k.load(folder, "train") if shots else []
    if shots > len(train):
        raise UserError(f"--shots {shots}: train.jsonl has {len(train)} problems", "fewer --shots")
    problems = gsm8k.load(folder, "test")[:limit]
    name, tokens = _model(model)
    items = gsm8k.items(problems, train[:shots], tokens.encode, max_tokens)
    settings = Settings(
        name,
        fitting_length(items, max_model_len, tokens.positions),
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        prefill=prefill,
    )
    header = _header(name, settings, task="gsm8k", shots=shots, max_tokens=max_tokens)
    _ask(compare.Comparison(settings, rows, header, json_path), items, f"GSM8K, {shots}-shot")


@app.command("passkey")
def passkey_command(
    model: ModelArgument = None,
    cache: CacheOption = None,
    data: Annotated[
        Path | None, typer.Option(help="KIVI's passkey_examples.jsonl, instead of made prompts.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Repeatable: tokens of a prompt. Default: 4096.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Hide it in real text instead: pydoc, austen, wiki, or the path of a file."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Keys a length, over its depths.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the keys' digits.")] = 0,
    max_model_len: LengthOption = None,
    prefill: PrefillOption = None,
    kv_cache_memory_bytes: BytesOption = None,
    max_num_batched_tokens: BatchOption = None,
    max_num_seqs: SeqsOption = 8,
    json_path: JsonOption = None,
) -> None:
    """A pass key in filler text, by length (KIVI's example: 12k tokens) and depth."""
    rows = _rows(cache, json_path, prefill)
    name, tokens = _model(model)
    lengths = length or [4096]
    about: dict[str, Any] = dict(lengths=lengths, seed=seed, text=text and Path(text).stem)
    if data is not None:
        if length or text is not None:
            raise UserError("--data has prompts of its own", "leave out --length and --text")
        about = dict(data=data.name)
        items = passkey.read(data, tokens)[:limit]
    elif text is not None:
        items = passkey.in_text(text, name, lengths, limit, seed)
    else:
        items = passkey.items(lengths, limit, tokens, seed)
    settings = Settings(
        name,
        fitting_length(items, max_model_len, tokens.positions),
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        prefill=prefill,
    )
    header = _header(name, settings, task="passkey", **about)
    _ask(compare.Comparison(settings, rows, header, json_path), items, "Pass key found")


@app.command("longbench")
def longbench_command(
    model: ModelArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; _e at the end for LongBench-E. Default: KIVI's 15."),
    ] = None,
    cache: CacheOption = None,
    data: DataOption = None,
    download: DownloadOption = False,
    limit: LimitOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a prompt; more are cut from its middle. Default: LongBench's rule, 500 "
            "less than the model's thousands.",
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    max_model_len: LengthOption = None,
    prefill: PrefillOption = None,
    kv_cache_memory_bytes: BytesOption = None,
    max_num_batched_tokens: BatchOption = None,
    max_num_seqs: SeqsOption = 8,
    json_path: JsonOption = None,
) -> None:
    """LongBench: its prompts, its truncation in the middle, its metrics."""
    rows = _rows(cache, json_path, prefill)
    names = list(dict.fromkeys(task or longbench_tasks.KIVI_TASKS))
    longbench.check_packages(names)
    folder = _folder(longbench.DATA, data, download)
    found = {one: longbench.load(folder, one)[:limit] for one in names}
    name, tokens = _model(model)
    if max_length is None:
        positions = max_model_len or tokens.positions
        if positions is None:
            raise UserError(f"{name} does not say how long its sequences may be", "--max-length")
        max_length = longbench.prompt_limit(positions)
    items = [
        item
        for one, its in found.items()
        for item in longbench.items(one, its, tokens, max_length, chat)
    ]
    cut = {one: sum(i.facts["cut"] > 0 for i in items if i.task == one) for one in names}
    shortened = ", ".join(f"{one} {n} of {len(found[one])}" for one, n in cut.items() if n)
    note(f"Shortened in the middle to {max_length:,} tokens: {shortened or 'none'}")
    settings = Settings(
        name,
        fitting_length(items, max_model_len, tokens.positions),
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        prefill=prefill,
    )
    header = _header(name, settings, task="longbench", max_length=max_length, cut=cut, chat=chat)
    title = f"LongBench, prompts of at most {max_length:,} tokens ({sum(cut.values())} shortened)"
    _ask(compare.Comparison(settings, rows, header, json_path), items, title)


@app.command("pg19")
def pg19_command(
    model: ModelArgument = None,
    cache: CacheOption = None,
    data: DataOption = None,
    download: DownloadOption = False,
    limit: Annotated[int, typer.Option(min=1, help="Books, the first ones.")] = 1,
    length: Annotated[
        list[int] | None,
        typer.Option(min=16, help="Repeatable: tokens of context. Default: 1024, 2048, 4096."),
    ] = None,
    max_model_len: LengthOption = None,
    kv_cache_memory_bytes: BytesOption = None,
    json_path: JsonOption = None,
) -> None:
    """Perplexity of PG-19's books by context length; every token reads the cache as at decode."""
    rows = _rows(cache, json_path)
    lengths = sorted(set(length or [1024, 2048, 4096]))
    books = pg19.load(_folder(pg19.DATA, data, download), limit)
    name, tokens = _model(model)
    windows = pg19.windows(books, lengths[-1], tokens)
    whole = [Item("pg19", b.name, w, 0, [], {}) for b, w in zip(books, windows, strict=True)]
    settings = Settings(
        name,
        fitting_length(whole, max_model_len, tokens.positions),
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        prefill="cached",
    )
    titles = [book.name for book in books]
    header = _header(name, settings, task="pg19", lengths=lengths, books=titles)
    comparison = compare.Comparison(settings, rows, header, json_path)
    found = comparison.figures(windows, lengths)
    title = f"PG-19, the first tokens of: {', '.join(titles)}"
    compare.show(title, compare.perplexity_table(found))
    comparison.finish()


def _rows(
    cache: list[str] | None, json_path: Path | None, prefill: str | None = None
) -> list[CacheRow]:
    """The caches; mistakes show before anything slow begins."""
    check_folder("--json", json_path)
    modes = get_args(PrefillMode)
    if prefill is not None and prefill not in modes:
        raise UserError(
            f"--prefill {prefill}: there is no such mode", f"one of: {', '.join(modes)}"
        )
    return [CacheRow.parse(one) for one in dict.fromkeys(cache or CACHES)]


def _folder(data: DataSet, given: Path | None, download: bool) -> Path:
    folder = data.folder(given)
    if download:
        data.fetch(folder)
    return folder


def _model(given: str | None) -> tuple[str, Tokens]:
    name = given if given is not None else str(default_model())
    return name, Tokens(name)


def _header(model: str, settings: Settings, **about: Any) -> dict[str, Any]:
    return {
        **machine.header("evaluate.py"),
        "model": Path(model).name,
        "max_model_len": settings.max_model_len,
        **about,
    }


def _ask(comparison: compare.Comparison, items: Sequence[Item], title: str) -> None:
    found = comparison.answers(items)
    compare.show(title, compare.score_table(found))
    comparison.finish()


if __name__ == "__main__":
    main(app)
