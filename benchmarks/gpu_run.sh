#!/usr/bin/env bash
# Checks, benchmarks, a profile, tests and pictures on a machine with an NVIDIA GPU, what tells most
# first: see README.md here.
#
#   benchmarks/gpu_run.sh                            kernels alone: PyTorch and Triton suffice
#   MODEL=/models/llama benchmarks/gpu_run.sh        and a whole engine
#
# OUT          folder of the results (benchmarks/results)
# PARTS        "canary headline sweep profile engine attention tests plots", or some of them; "serving"
#              only if named
# MODEL        folder of a model; without weights in it, they are random
# LIMIT        seconds for everything (500); ATTENTION_S, ENGINE_S, TESTS_S: for these parts
# DTYPES       of the cache, for the whole engine ("auto fp8 kivi2 kivi_k3v2"); VLLM_ARGS: for vLLM
# MEMORY       of the cache, for serving (4GiB); SERVING_ARGS: more for it
# PYTHON       the interpreter (python, else python3)
#
# A part that fails does not stop the others; the exit status is 1 if any did.
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/results}
PARTS=${PARTS:-canary headline sweep profile engine attention tests plots}
MODEL=${MODEL:-}
LIMIT=${LIMIT:-500}
DTYPES=${DTYPES:-auto fp8 kivi2 kivi_k3v2}
VLLM_ARGS=${VLLM_ARGS:-}
MEMORY=${MEMORY:-4GiB}
SERVING_ARGS=${SERVING_ARGS:---section long --section shared}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
TESTS_S=${TESTS_S:-120}
ENGINE_S=${ENGINE_S:-200}
if [ -n "$MODEL" ]; then ATTENTION_S=${ATTENTION_S:-40}; else ATTENTION_S=${ATTENTION_S:-150}; fi

mkdir -p "$OUT" || exit 1
work=$(mktemp -d) || exit 1
touch "$work/start"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
# Compiled kernels are kept for all parts, and taken home.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
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

kernels=("$PYTHON" -m benchmarks.attention --device cuda)

if wanted canary; then
    part canary 120 "$PYTHON" -m benchmarks.attention.gpu.canary --json "$OUT/canary-cuda.json"
fi

# The two cases that the project is judged by.
if wanted headline; then
    part headline 90 "${kernels[@]}" --section decode --shape llama3-8b --context 32768 --batch 32 \
        --json "$OUT/headline-batch-cuda.json"
    part headline-one 60 "${kernels[@]}" --section decode --shape llama3-8b --context 65536 --batch 1 \
        --json "$OUT/headline-one-cuda.json"
fi

# Both of our decode kernels, by the number of splits.
if wanted sweep; then
    part sweep 90 "$PYTHON" -m benchmarks.attention.gpu.sweep --json "$OUT/sweep-cuda.json"
fi

# Where a kernel's time goes: enough to calibrate the model of the hardware without the device.
if wanted profile; then
    if ! command -v ncu >/dev/null; then
        note profile "skipped: there is no ncu"
    else
        part profile 60 ncu --clock-control none --set full --target-processes all \
            -k 'regex:decode|combine' -c 2 -f -o "$OUT/decode-cuda" \
            "${kernels[@]}" --section decode --shape llama3-8b --context 32768 --batch 32 --budget 0
    fi
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" \
                -m benchmarks.attention.gpu.canary --shape tiny --cache kivi2
        done
    fi
fi

engine() { # module, seconds at most, arguments; then -- and what vLLM gets
    local module=$1 most=$2
    shift 2
    part "$module" "$most" "$PYTHON" -m "benchmarks.$module" "$MODEL" "$@"
}

if wanted engine; then
    if [ -z "$MODEL" ]; then
        note engine "skipped: MODEL names no model"
    elif ! has vllm; then
        tail -n 1 "$work/import.log"
        note engine "skipped: vllm cannot be imported"
    else
        options=()
        for dtype in $DTYPES; do options+=(--kv-cache-dtype "$dtype"); done
        load=()
        if compgen -G "$MODEL/*.safetensors" >/dev/null || compgen -G "$MODEL/*.bin" >/dev/null
        then
            # Long answers against those of vLLM's own cache; kivi_raw's differ by rounding alone.
            engine quality 120 --section generation --cache auto --cache kivi_raw --cache kivi2 \
                --cache kivi_k3v2 --json "$OUT/quality-cuda.json"
        else
            load=(--load-format dummy)
        fi
        engine engine.capacity 60 --memory 40GiB --json "$OUT/capacity-cuda.json"
        export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
        # shellcheck disable=SC2086  # VLLM_ARGS are several words
        engine engine.throughput "$ENGINE_S" --input-len 4096 --output-len 256 --num-prompts 128 \
            "${options[@]}" --json "$OUT/throughput-cuda.json" \
            -- --max-model-len 8192 ${load[@]+"${load[@]}"} $VLLM_ARGS
    fi
fi

json=$OUT/attention-cuda.json
if wanted attention; then
    left=$((LIMIT - SECONDS - 60))
    if ((ATTENTION_S > left)); then ATTENTION_S=$((left > 30 ? left : 30)); fi
    part attention $((ATTENTION_S + 60)) "${kernels[@]}" --seconds "$ATTENTION_S" --json "$json"
fi

if wanted tests; then
    parallel=()
    workers=$(($(nproc) - 2))
    if ((workers > 1)) && has xdist; then parallel=(-n "$workers"); fi # mostly they compile
    # Without addopts, plugins that pyproject.toml counts on may be missing.
    part tests "$TESTS_S" "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= \
        --junitxml "$OUT/tests-cuda.xml" ${parallel[@]+"${parallel[@]}"} \
        tests/triton/test_decode.py tests/triton/test_store.py tests/triton
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

# What was compiled: PTX and machine code of every variant.
if [ -d "$TRITON_CACHE_DIR" ]; then
    (cd "$TRITON_CACHE_DIR" && find . \( -name '*.ptx' -o -name '*.cubin' -o -name '_*.json' \) -print0 |
        tar -czf - --null -T -) >"$OUT/kernels-cuda.tar.gz"
fi

echo "=== summary, after $SECONDS s"
printf '%s\n' ${summary[@]+"${summary[@]}"}
# Last, since only the end of what was printed may be seen.
"$PYTHON" - "$OUT"/headline-*-cuda.json <<'EOF'
import json, pathlib, sys

for path in filter(pathlib.Path.is_file, map(pathlib.Path, sys.argv[1:])):
    for row in json.loads(path.read_text())["decode"]:
        figures = {k: row[k] for k in ("ratio_bf16", "ratio_fp8", "share_of_bandwidth") if k in row}
        print(f"batch {row['batch']} x {row['context']}: {row.get('skipped') or figures}")
EOF
exit "$failed"
