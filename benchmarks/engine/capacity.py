"""How many tokens fit into one memory, by cache dtype: `kivi-vllm plan`'s figures as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.machine import header
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.files import check_folder, write_json
from kivi_vllm.cli.main import main
from kivi_vllm.cli.plan import CACHE_DTYPES, capacity, parse_memory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    json_path: Annotated[Path, typer.Option("--json", help="Where to write it.")],
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Of the KV cache.")] = "256MiB",
    max_model_len: Annotated[
        list[int] | None, typer.Option(min=128, help="Repeatable; default: 4096 and 8192.")
    ] = None,
) -> None:
    """Ask vLLM's own accounting for every cache dtype; only the model's config is read."""
    check_folder("--json", json_path)
    size, folder = parse_memory(memory), model if model is not None else str(default_model())
    head = header("engine.capacity") | {"model": Path(folder).name, "memory_bytes": size}
    rows = [
        asdict(capacity(folder, dtype, size, length))
        for length in max_model_len or [4096, 8192]
        for dtype in CACHE_DTYPES
    ]
    write_json(json_path, {"header": head, "rows": rows})


if __name__ == "__main__":
    main(app)
