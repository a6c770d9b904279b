"""Answer a file of prompts with several engines side by side, on Ray: offline batch inference.

    pip install 'kivi-vllm[ray]'
    python examples/ray_batch.py prompts.jsonl answers.jsonl --model MODEL --replicas 2

`prompts.jsonl` has a row `{"id": ..., "prompt": ...}` a line (without an id: the line's number); a
file of any other name has a prompt a line. `answers.jsonl` gets a row for every id, in the order in
which they are done. Ray starts a replica that dies again and gives it its rows once more: none is
lost, none comes twice. With `--additional-config '{"kivi": {"prefill": "cached"}}'` an answer
depends on its prompt alone, not on the rows beside it.

Ray takes the cluster of `RAY_ADDRESS` or of `ray start`, and else makes one of this machine.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.main import main
from kivi_vllm.cli.progress import console, note

Row = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Replica:
    """One engine, in one process: whatever ends that process ends the engine and all it holds.

    Args:
        cores: how many cores it has to itself; 0: no binding.
        index: which share of its machine's cores that is.
        max_tokens: length limit of an answer.
        engine: arguments of `vllm.LLM`.
    """

    def __init__(self, cores: int, index: int, max_tokens: int, engine: dict[str, Any]) -> None:
        if cores:
            # Before torch makes its threads; vLLM's own binding knows nothing of other engines.
            allowed = sorted(os.sched_getaffinity(0))
            first = index * cores % len(allowed)
            os.sched_setaffinity(0, allowed[first : first + cores])
            os.environ.update(OMP_NUM_THREADS=str(cores), VLLM_CPU_OMP_THREADS_BIND="nobind")
        # An engine in a process of its own would outlive a replica that is killed, and keep its
        # memory from the next one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.llm = LLM(**engine)

    def answer(self, rows: list[Row]) -> list[Row]:
        """`rows` have `id` and `prompt`; returned are `id`, `text` and `finish_reason`."""
        found = self.llm.generate([r["prompt"] for r in rows], self.sampling, use_tqdm=False)
        return [
            dict(id=row["id"], text=one.outputs[0].text, finish_reason=one.outputs[0].finish_reason)
            for row, one in zip(rows, found, strict=True)
        ]


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        UserError: there is none, a line is not a row, or an id comes twice.
    """
    rows: dict[Any, Row] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        row: Any = dict(prompt=line)
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{path}:{number} is not of the form {{"id": ..., "prompt": "..."}}')
        name = row.get("id", number)
        if not isinstance(name, str | int):
            raise UserError(
                f"{path}:{number}: the id {name!r} is neither a text nor a whole number"
            )
        if name in rows:
            raise UserError(
                f"{path}:{number}: the id {name!r} comes twice", "give each row its own"
            )
        rows[name] = dict(id=name, prompt=row["prompt"])
    if not rows:
        raise UserError(f"{path} has no prompts")
    return list(rows.values())


def start(replicas: int, gpus: int, restarts: int, max_tokens: int, engine: dict[str, Any]) -> list:
    """The replicas, as actors of Ray; they start in the background.

    Raises:
        UserError: the cluster has too few cores or GPUs for them.
    """
    import ray

    try:
        ray.init()
    except ConnectionError as error:
        remedy = "see `ray status`; a cluster with tokens needs RAY_AUTH_MODE=token here too"
        raise UserError(str(error), remedy, status=1) from None
    allowed = len(os.sched_getaffinity(0))
    cores = 0 if gpus else max(1, allowed // replicas)
    there = ray.cluster_resources()
    for kind, each in {"CPU": cores or 1, "GPU": gpus}.items():
        if replicas * each > there.get(kind, 0):
            raise UserError(
                f"--replicas {replicas} with {each} {kind} each need {replicas * each}, "
                f"and Ray has {there.get(kind, 0):g}",
                "ask for fewer replicas, or add machines with `ray start --address ...`",
            )
    actor: Any = ray.remote(
        num_cpus=cores or 1,
        num_gpus=gpus,
        max_restarts=restarts,
        max_task_retries=-1,  # as often as the replica is restarted
    )(Replica)
    return [actor.remote(cores, i, max_tokens, engine) for i in range(replicas)]


def answers(actors: list, batches: Iterable[list[Row]]) -> Iterable[list[Row]]:
    """What the replicas answer, batch by batch as they are done.

    Raises:
        UserError: a replica could not be started, or died more often than it may.
    """
    import ray
    from ray.util import ActorPool

    pool = ActorPool(actors)
    try:
        yield from pool.map_unordered(lambda actor, rows: actor.answer.remote(rows), batches)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        remedy = "the replicas' output is above; see --restarts, --memory-mib and --max-model-len"
        raise UserError(f"a replica is gone for good: {reason}", remedy, status=1) from None


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Prompts.")],
    target: Annotated[Path, typer.Argument(help="Answers, in JSON lines.")],
    model: Annotated[str, typer.Option(help="Model; SmolLM2-135M-Instruct if not given.")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 2,
    kv_cache_dtype: Annotated[str, typer.Option(help="Cache format.")] = "kivi_k3v2",
    memory_mib: Annotated[int, typer.Option(min=1, help="KV cache of each engine, MiB.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 128,
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest sequence.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Dtype of the model, as vLLM's.")] = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Do not compile: quicker to start.")] = False,
    additional_config: Annotated[
        str, typer.Option(help='Options of the KIVI dtypes: {"kivi": {...}}, as for vllm serve.')
    ] = "{}",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows given to a replica together: what its death costs.")
    ] = 64,
    gpus: Annotated[
        int,
        typer.Option(min=0, help="GPUs of each engine, tensor parallel; 0: its share of cores."),
    ] = 0,
    restarts: Annotated[int, typer.Option(min=0, help="Deaths that a replica may survive.")] = 3,
) -> None:
    """Answer every prompt of SOURCE once; TARGET appears when all is done."""
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed", "pip install 'kivi-vllm[ray]'", status=1) from None
    rows = read(source)
    try:
        additional = json.loads(additional_config)
    except ValueError as error:
        raise UserError(f"--additional-config {additional_config} is not JSON: {error}") from None
    engine = dict(
        model=model or str(default_model()),
        kv_cache_dtype=kv_cache_dtype,
        additional_config=additional,
        kv_cache_memory_bytes=memory_mib << 20,
        max_model_len=max_model_len,
        dtype=dtype,
        enforce_eager=enforce_eager,
        tensor_parallel_size=max(1, gpus),
    )
    actors = start(replicas, gpus, restarts, max_tokens, engine)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    partial = target.with_name(target.name + ".part")
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn())
    with (
        partial.open("w") as out,
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
    ):
        for done in bar.track(answers(actors, batches), total=len(batches), description="batches"):
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
            out.flush()
    partial.replace(target)
    note(f"{len(rows)} rows in {target}")
    ray.shutdown()


if __name__ == "__main__":
    main(app)
