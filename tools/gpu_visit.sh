#!/usr/bin/env bash
# What can be learned on a borrowed GPU, step by step, the most valuable first.
#
#   bash tools/gpu_visit.sh [--dry] STEP...
#
#   pack      elsewhere, with network: fetch the packages that the GPU machine may lack
#   setup     link the source tree, list versions, make bundles (the full-size one in the background)
#   loop      the driver, the kernels, CUDA graphs, streams, memory and faults; needs no engine
#   torch     the torch backend: tests, then figures at full size
#   ort       ONNX Runtime on CUDA: tests, then figures
#   peers     diffusers, plain and compiled
#   sanitize  compute-sanitizer over some of `loop`
#
# Runs from the source tree, without network, virtual environment or installation. Every part has its
# own time limit, and nothing begins that would exceed LIMIT_SECONDS for the call: give it a step or
# two. Logs, JSON and one line for each part (visit.jsonl) are in $OUT after every part; a table comes
# last. A part that cannot run says why. --dry does the same on any machine, with the CPU and the
# embedded model where a GPU would be.
#
# LIMIT_SECONDS  default: 540
# OUT      results; default: benchmarks/results
# WORK     bundles and links, kept between calls; default: /tmp/sdrt-gpu-visit
# SITE     packages that were carried along; default: build/gpu-visit/site
# PYTHON   default: python3
set -u
cd "$(dirname "$0")/.." || exit 1
STEPS="pack setup loop torch ort peers sanitize"
PYTHON=${PYTHON:-python3} LIMIT_SECONDS=${LIMIT_SECONDS:-540} DRY=
OUT=$(realpath -m "${OUT:-benchmarks/results}") WORK=$(realpath -m "${WORK:-/tmp/sdrt-gpu-visit}")
SITE=$(realpath -m "${SITE:-build/gpu-visit/site}")
mkdir -p "$OUT" "$WORK"
export PYTHONPATH="$SITE:$WORK/package:tools:tests/helpers" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export SDRT_HOME="$WORK/home" SDRT_TEST_CACHE="$WORK/test-cache"

record() { # part, result, seconds, note
    printf '{"part": "%s", "result": "%s", "seconds": %s, "note": "%s"}\n' \
        "$1" "$2" "$3" "$(tr -d '"\\' <<<"$4" | tr '\n\t' '  ' | cut -c-160)" >>"$OUT/visit.jsonl"
    printf '%-22s %-9s %5s s  %s\n' "$1" "$2" "$3" "$(tr '\n' ' ' <<<"$4" | cut -c-110)" | tee -a "$WORK/table"
}

left() { echo $((LIMIT_SECONDS - SECONDS)); }

part() { # name, seconds, command...: run it, whatever became of the parts before
    local name=$1 limit=$2 began=$SECONDS log="$OUT/visit-$1.log" code result=passed
    shift 2
    [ "$(left)" -lt "$limit" ] && limit=$(left)
    [ "$limit" -lt 10 ] && { record "$name" skipped 0 "no time is left in this call"; return; }
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    code=$?
    [ $code -ne 0 ] && result="failed"
    [ $code -eq 124 ] || [ $code -eq 137 ] && result="stopped"
    record "$name" "$result" $((SECONDS - began)) "$(grep -v '^ *$' "$log" | tail -n 1)"
    return $code
}

skip() { record "$1" skipped 0 "$2"; }

has() { "$PYTHON" -c "import importlib, sys; importlib.import_module(sys.argv[1])" "$1" >/dev/null 2>&1; }

has_gpu() { "$PYTHON" -c "
import sys
from sdrt.engine.gpu import detect_gpus
sys.exit(detect_gpus().unavailable_reason)" 2>&1; }

gpu_tests() { # part, seconds, pytest's arguments...
    local name=$1 limit=$2
    shift 2
    if ! why=$(has_gpu); then
        # Collected nevertheless: what cannot even be imported is known before a GPU is at hand.
        if [ -n "$DRY" ]; then part "$name" "$limit" "$PYTHON" -m pytest -m gpu --collect-only "$@"; else skip "$name" "$why"; fi
        return
    fi
    part "$name" "$limit" "$PYTHON" -m pytest -m gpu -p no:cacheprovider -rs --durations=10 --junitxml="$OUT/visit-$name.xml" "$@"
}

measure() { # part, seconds, seconds an engine, engines, further arguments...
    local name=$1 limit=$2 each=$3 engines=$4
    shift 4
    if [ -n "$DRY" ] && [[ "$engines" == *compiled* ]]; then skip "$name" "compiling takes minutes on a CPU"; return; fi
    local where=(--work "$WORK/full" --seconds "$each" "$@")
    [ -n "$DRY" ] && where=(--work "$WORK/embedded" --device cpu --model shapes --sizes 32x32
        --rows 1,2 --steps 1 --rounds 2 --seconds 60)
    if [ -z "$DRY" ]; then
        if ! why=$(has_gpu); then skip "$name" "$why"; return; fi
        wait_for_full || { skip "$name" "the full-size bundle is not there: see visit-full.log"; return; }
    fi
    part "$name" "$limit" "$PYTHON" benchmarks/gpu.py --engines "$engines" --out "$OUT/gpu-$name.json" "${where[@]}"
    grep '^|' "$OUT/visit-$name.log" >>"$WORK/figures"
    echo >>"$WORK/figures"
}

wait_for_full() { # the bundle that `setup` makes in the background, also in an earlier call
    while [ ! -e "$WORK/full/bundle/sdrt.json" ]; do
        [ -e "$WORK/full.pid" ] && kill -0 "$(cat "$WORK/full.pid")" 2>/dev/null || return 1
        [ "$(left)" -lt 30 ] && return 1
        sleep 1
    done
}

pack() {
    part pack 300 "$PYTHON" -m pip install --quiet --upgrade --target "$SITE" --no-deps --python-version 3.12 \
        --only-binary=:all: filelock diffusers importlib_metadata zipp
    du -sh "$SITE" 2>/dev/null
}

setup() {
    rm -rf "$WORK/package"
    part link 20 "$PYTHON" tools/link_package.py "$WORK/package"
    if [ -n "$(command -v nvidia-smi)" ]; then part nvidia-smi 20 nvidia-smi -q; else skip nvidia-smi "no such command"; fi
    part packages 120 "$PYTHON" tools/gpu_packages.py
    if [ -z "$DRY" ]; then
        setsid nohup timeout 400 "$PYTHON" -c "
import sys
from pathlib import Path
sys.path.insert(0, 'benchmarks')
from published import made_bundle
made_bundle(Path('$WORK/full'), ['512x512'], '--fp16', '--batch', '1:1:8')" >"$OUT/visit-full.log" 2>&1 &
        echo $! >"$WORK/full.pid"
    else
        skip full "a dry run measures the embedded model"
    fi
    part doctor 60 "$PYTHON" -m sdrt doctor
    part embedded 60 "$PYTHON" -c "
from pathlib import Path
from sdrt.bundle.embedded import materialize
print(materialize('shapes', Path('$WORK/shapes')))"
}

loop() {
    if [ -e tests/test_gpu_loop.py ]; then gpu_tests loop 300 tests/test_gpu_loop.py; else skip loop "no tests/test_gpu_loop.py"; fi
    gpu_tests hidden 60 tests/test_gpu.py -k "hidden"
}

torch() {
    if ! has torch; then skip torch "torch is not installed"; return; fi
    gpu_tests torch-tests 150 tests/test_gpu.py -k "torch and not no_torch"
    measure torch 150 55 "torch graphs,torch" --rows 1,2,8 --steps 4,20,50
    measure torch-compiled 330 160 "torch compiled graphs,torch compiled" --rows 2,8 --steps 4,20,50
}

ort() {
    if [ -z "$DRY" ] && ! "$PYTHON" -c "
import onnxruntime, sys
sys.exit('CUDAExecutionProvider' not in onnxruntime.get_available_providers())" >/dev/null 2>&1; then
        skip ort "no onnxruntime with CUDA; unpack onnxruntime-gpu into $SITE"
        return
    fi
    gpu_tests ort-tests 220 tests/test_gpu.py -k "onnxruntime or fused"
    measure ort 300 130 "onnxruntime,onnxruntime plain" --rows 1,2,4,8,16 --steps 4,20,50
}

peers() {
    if ! has diffusers; then skip peers "diffusers is not installed; run the step pack, with network"; return; fi
    measure peers 160 70 "diffusers" --rows 1,2,8 --steps 4,20,50
    measure peers-compiled 330 300 "diffusers compiled" --rows 2 --steps 20,50
}

sanitize() {
    if [ -z "$(command -v compute-sanitizer)" ]; then skip sanitize "no compute-sanitizer"; return; fi
    if ! why=$(has_gpu); then skip sanitize "$why"; return; fi
    part sanitize 500 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -m gpu \
        -p no:cacheprovider tests/test_gpu_loop.py -k "host or single or arena"
}

[ "${1:-}" = --dry ] && { DRY=1; shift; }
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
[[ "${1:-}" == @(-h|--help) ]] && { usage; exit 0; }
[ $# -eq 0 ] && { usage; exit 2; }
for step in "$@"; do
    [[ " $STEPS " == *" $step "* ]] || { echo "gpu_visit.sh: no step $step; expected $STEPS" >&2; exit 2; }
done
: >"$WORK/table" && : >"$WORK/figures"
for step in "$@"; do "$step"; done
wait_for_full # a machine may end what runs in the background with the call
printf '\n'
cat "$WORK/table" "$WORK/figures" | tee "$OUT/visit-table.txt"
! grep -Eq '^\S+ +(failed|stopped) ' "$WORK/table"
