#!/usr/bin/env bash
# Tests, benchmarks and pictures on a machine with an NVIDIA GPU: see README.md here.
#
#   benchmarks/gpu_run.sh                            kernels alone: PyTorch and Triton suffice
#   MODEL=/models/llama benchmarks/gpu_run.sh        and a whole engine
#
# OUT          folder of the results (benchmarks/results)
# PARTS        "tests attention throughput plots", or some of them; "serving" only if named
# MODEL        folder of a model; without weights in it, they are random
# LIMIT        seconds for everything (570); TESTS_S, ATTENTION_S: for these parts
# DTYPES       of the cache, for the whole engine ("auto fp8 kivi2"); VLLM_ARGS: more for vLLM
# MEMORY       of the cache, for serving (4GiB); SERVING_ARGS: more for it
# PYTHON       the interpreter (python, else python3)
#
# A part that fails does not stop the others; the exit status is 1 if any did.
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/results}
PARTS=${PARTS:-tests attention throughput plots}
MODEL=${MODEL:-}
LIMIT=${LIMIT:-570}
DTYPES=${DTYPES:-auto fp8 kivi2}
VLLM_ARGS=${VLLM_ARGS:-}
MEMORY=${MEMORY:-4GiB}
SERVING_ARGS=${SERVING_ARGS:---section long --section shared}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
TESTS_S=${TESTS_S:-150}
if [ -n "$MODEL" ]; then ATTENTION_S=${ATTENTION_S:-130}; else ATTENTION_S=${ATTENTION_S:-300}; fi

mkdir -p "$OUT" || exit 1
work=$(mktemp -d) || exit 1
touch "$work/start"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
summary=() failed=0

note() { # part, what became of it
    summary+=("$1: $2")
    echo "--- $1: $2"
}

part() { # name, seconds at most, command
    local name=$1 most=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status
    shift 2
    if ((most > left)); then most=$left; fi
    if ((most < 10)); then
        note "$name" "failed: no time left"
        failed=1
        return
    fi
    echo "=== $name (at most $most s): $*"
    timeout --signal=INT --kill-after=15 "$most" "$@"
    status=$?
    case $status in
    0) note "$name" "ok, $((SECONDS - start)) s" ;;
    124 | 137) note "$name" "failed: cut off after $most s" ;;
    *) note "$name" "failed with status $status, $((SECONDS - start)) s" ;;
    esac
    if ((status)); then failed=1; fi
}

wanted() { [[ " $PARTS " == *" $1 "* ]]; }
has() { "$PYTHON" -c "import $1" >"$work/import.log" 2>&1; }

# vLLM finds plugins by their distributions; a checkout that is not installed is none.
register() {
    "$PYTHON" - "$work" <<'EOF'
import pathlib, sys, tomllib
from importlib.metadata import entry_points

from kivi_vllm import __version__ as version

if not any(one.name == "kivi" for one in entry_points(group="vllm.general_plugins")):
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    folder = pathlib.Path(sys.argv[1], f"{name}-{version}.dist-info")
    folder.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
    (folder / "METADATA").write_text(head)
    lines = [f"{key} = {value}" for key, value in
             project["entry-points"]["vllm.general_plugins"].items()]
    (folder / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
EOF
    export PYTHONPATH="$PYTHONPATH:$work"
}

register || note registration "failed: vLLM will not find the plugin"

if wanted tests; then
    folders=()
    for folder in tests/triton tests/gpu; do
        if [ -d "$folder" ]; then folders+=("$folder"); fi
    done
    if ((${#folders[@]} == 0)); then
        note tests "skipped: there are none for GPUs"
    else
        parallel=()
        if has xdist; then parallel=(-n 4); fi # most of the time goes into compiling
        # Without addopts, plugins that pyproject.toml counts on may be missing.
        part tests "$TESTS_S" "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= \
            ${parallel[@]+"${parallel[@]}"} "${folders[@]}"
    fi
fi

json=$OUT/attention-cuda.json
if wanted attention; then
    left=$((LIMIT - SECONDS - 60))
    if ((ATTENTION_S > left)); then ATTENTION_S=$((left > 30 ? left : 30)); fi
    part attention $((ATTENTION_S + 60)) "$PYTHON" -m benchmarks.attention --device cuda \
        --seconds "$ATTENTION_S" --json "$json"
fi

if wanted throughput; then
    if [ -z "$MODEL" ]; then
        note throughput "skipped: MODEL names no model"
    elif ! has vllm; then
        tail -n 1 "$work/import.log"
        note throughput "skipped: vllm cannot be imported"
    else
        options=()
        for dtype in $DTYPES; do options+=(--kv-cache-dtype "$dtype"); done
        load=()
        if ! compgen -G "$MODEL/*.safetensors" >/dev/null && ! compgen -G "$MODEL/*.bin" >/dev/null
        then load=(--load-format dummy); fi
        export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
        # shellcheck disable=SC2086  # VLLM_ARGS are several words
        part throughput $((LIMIT - SECONDS - 20)) "$PYTHON" -m benchmarks.engine.throughput "$MODEL" \
            --input-len 4096 --output-len 256 --num-prompts 128 "${options[@]}" \
            --json "$OUT/throughput-cuda.json" \
            -- --max-model-len 8192 ${load[@]+"${load[@]}"} $VLLM_ARGS
    fi
fi

if wanted serving; then
    if [ -z "$MODEL" ]; then
        note serving "skipped: MODEL names no model"
    else
        options=()
        for dtype in $DTYPES; do options+=(--kv-cache-dtype "$dtype"); done
        # shellcheck disable=SC2086  # they are several words
        part serving $((LIMIT - SECONDS - 20)) "$PYTHON" -m benchmarks.serving "$MODEL" \
            --memory "$MEMORY" "${options[@]}" $SERVING_ARGS --json "$OUT/serving-cuda.json" \
            -- $VLLM_ARGS
    fi
fi

if wanted plots; then
    if ! has matplotlib || ! has pandas; then
        tail -n 1 "$work/import.log"
        note plots "skipped: matplotlib or pandas cannot be imported"
    elif [ ! -f "$json" ]; then
        note plots "skipped: there is no $json"
    elif wanted attention && [ ! "$json" -nt "$work/start" ]; then
        note plots "skipped: $json is not of this run"
    else
        part plots 60 "$PYTHON" -m benchmarks.attention.plot "$json" -o "$OUT/attention-cuda"
    fi
fi

echo "=== summary, after $SECONDS s"
printf '%s\n' ${summary[@]+"${summary[@]}"}
exit "$failed"
