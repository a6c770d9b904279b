"""The command line `kivi-vllm`: demo, doctor, plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kivi_vllm.cli.demo import QUESTION, Demo
from kivi_vllm.cli.errors import UserError, mistakes_shown
from kivi_vllm.config import QUANTIZED_DTYPES, RECOMMENDED_DTYPE, RENAMED_DTYPES

app = typer.Typer(
    help=f"The KIVI KV cache for vLLM: vllm serve MODEL --kv-cache-dtype {RECOMMENDED_DTYPE}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _known(kv_cache_dtype: str) -> str:
    """The dtype, if it is there (typer's own message would not name what took its place)."""
    if kv_cache_dtype in QUANTIZED_DTYPES:
        return kv_cache_dtype
    former = kv_cache_dtype in RENAMED_DTYPES
    good = RENAMED_DTYPES[kv_cache_dtype] if former else f"one of: {', '.join(QUANTIZED_DTYPES)}"
    what = "is no more" if former else "is unknown"
    raise UserError(f"--kv-cache-dtype {kv_cache_dtype} {what}", f"use {good}")


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 64,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Cache format to compare with bf16.",
            metavar="|".join(QUANTIZED_DTYPES),
            callback=_known,
        ),
    ] = RECOMMENDED_DTYPE,
    memory_mib: Annotated[int, typer.Option(min=1, help="Memory of the KV cache, in MiB.")] = 256,
    max_model_len: Annotated[int, typer.Option(min=128, help="Longest sequence.")] = 4096,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that the server may take to start.")
    ] = 900.0,
    keep_log: Annotated[bool, typer.Option(help="Keep the logs.")] = False,
) -> None:
    """Serve a small model with the quantized cache, ask it something, show the gain."""
    from kivi_vllm.cli.doctor import refuse_if_unfit

    refuse_if_unfit()
    options = Demo(
        model=model,
        question=question,
        max_tokens=max_tokens,
        kv_cache_dtype=kv_cache_dtype,
        memory_mib=memory_mib,
        max_model_len=max_model_len,
        timeout=timeout,
        keep_log=keep_log,
    )
    try:
        options.run()
    except KeyboardInterrupt:  # the server is gone by now
        raise typer.Exit(130) from None


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say whether serving would work here, and what is missing; status 1 if it would fail."""
    from kivi_vllm.cli.doctor import report

    raise typer.Exit(report(as_json))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    memory: Annotated[str, typer.Option(help="Memory for the KV cache, as in 20GiB.")],
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; the model's own if not given.")
    ] = None,
    additional_config: Annotated[
        str, typer.Option(help='Options of the KIVI dtypes: {"kivi": {...}}, as for vllm serve.')
    ] = "{}",
) -> None:
    """Show how many tokens and sequences fit into a given memory, by cache format."""
    from kivi_vllm.cli.plan import plan_table

    plan_table(model, memory, max_model_len, additional_config)


def main(command: Callable[[], object] = app) -> None:
    """Entry point: a user's mistake is one message with its remedy, never a traceback."""
    with mistakes_shown():
        command()
