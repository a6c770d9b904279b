"""What the benchmarks' command lines share: their options, and mistakes in one line."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from kivi_vllm.cli.errors import UserError, mistakes_shown

Model = Annotated[
    str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--kv-cache-dtype", help="Repeatable; the others are compared with the first."),
]
Memory = Annotated[str, typer.Option("--memory", help="Of the KV cache, as in 256MiB.")]
Repeat = Annotated[int, typer.Option(min=1, help="Rounds over all dtypes.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write it.")]
Prefix = Annotated[Path, typer.Option("-o", "--output", help="Beginning of the files' names.")]


def require(module: str) -> None:
    """End here, with the remedy, if a module is missing that is needed sooner or later."""
    if find_spec(module) is None:
        sys.exit(f"error: {module} is not installed\nremedy: pip install 'kivi-vllm[bench]'")


def start(command: Callable[..., Any], passes_on: bool = False) -> None:
    """Run a function as the command line of its module; its arguments are the options.

    With `passes_on`, what follows `--` is not ours: it is its context's object, a list of words.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    words = sys.argv[1:]
    cut = words.index("--") if passes_on and "--" in words else len(words)
    with mistakes_shown():
        app(args=words[:cut], obj=words[cut + 1 :])


def among(option: str, given: Sequence[str], known: Any) -> list[str]:
    """The names that an option was given, each once; UserError if one of them is not known."""
    for name in given:
        if name not in known:
            raise UserError(f"{option} {name}: there is none", f"use one of: {', '.join(known)}")
    return list(dict.fromkeys(given))


def folder_of(model: str | None) -> str:
    """The model that is measured: the demo's where none is named."""
    from kivi_vllm.cli.default_model import default_model

    return model if model is not None else str(default_model())


def failures(failed: dict[str, UserError]) -> None:
    """Say at the end, in a UserError, what could not be measured; the others went on."""
    if failed:
        text = "\n\n".join(f"{name}: {error}" for name, error in failed.items())
        raise UserError(text, next(iter(failed.values())).remedy, status=1)
