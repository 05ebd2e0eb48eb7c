#!/usr/bin/env bash
# All that a machine with a CUDA device can show, in one table: device, tests, benchmark. Needs Python ≥ 3.11 and torch.
#
#   tests/gpu/run.sh [--wheels FOLDER] [--out FOLDER] [--limit SECONDS] [--dry]
#
# --wheels  a folder of wheels to install from, without a network: warp-lang, numpy, pytest, and jax if it is wanted
# --out     where the table, logs and the environment go (out/gpu)
# --limit   seconds after which all of it stops (470); what was found by then is in the table
# --dry     on a CPU: the same steps, each as small as it can be, to see that they work
#
# Status 0 where every step passed, 1 where one failed or ran out of time, 2 for a mistake in the arguments.
set -uo pipefail
called_from=$PWD
cd "$(dirname "$0")/../.."
wheels="" out=out/gpu limit=470 dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --dry) dry=1; shift; continue ;;
        --wheels | --out | --limit) [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; } ;;&
        --wheels) wheels=$2 ;;
        --out) out=$2 ;;
        --limit) limit=$2 ;;
        *) echo "unknown: $1; see the head of tests/gpu/run.sh" >&2; exit 2 ;;
    esac
    shift 2
done
# folders count from where the script was called
[ -z "$wheels" ] || [[ "$wheels" = /* ]] || wheels=$called_from/$wheels
[[ "$out" = /* ]] || out=$called_from/$out
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "wheels: there is no folder $wheels" >&2; exit 2; }
[[ "$limit" =~ ^(0|[1-9][0-9]*)$ ]] || { echo "limit must be a number of seconds, got $limit" >&2; exit 2; }

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/*.log "$out"/steps.csv
export WARP_PHYS_GPU_DRY="$dry" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=cuda
[ -z "$dry" ] || device=cpu
python="$out/venv/bin/python"

# step NAME COMMAND…: at most what is left of the time; its output is in NAME.log, its end in steps.csv.
step() {
    local name=$1 left=$((limit - SECONDS)) begun=$SECONDS status
    shift
    if [ "$left" -le 0 ]; then
        echo "$name,no time left,0" >> "$out/steps.csv"
        return 1
    fi
    timeout --kill-after=5 "$left" "$@" > "$out/$name.log" 2>&1
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="out of time" ;;
        *) status="failed ($status)" ;;
    esac
    echo "$name,$status,$((SECONDS - begun))" >> "$out/steps.csv"
    [ "$status" = passed ]
}

environment() {
    # --without-pip: a machine without ensurepip makes one too; packages then go in by the pip that python has
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11, got " + sys.version)' ||
        return 1
    "${PYTHON:-python3}" -m venv --system-site-packages --without-pip "$out/venv" || return 1
    # what python has is seen where it is in an environment of its own, too
    "${PYTHON:-python3}" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth" || return 1
    if [ -n "$wheels" ]; then
        "${PYTHON:-python3}" -m pip --python "$python" install --no-index --find-links "$wheels" warp-lang numpy pytest || return 1
        "${PYTHON:-python3}" -m pip --python "$python" install --no-index --find-links "$wheels" jax || echo "no jax"
    fi
    "$python" -c 'import numpy, pytest, torch, warp'
}
export -f environment
export out wheels python

failed=0
if step environment bash -c environment; then
    step device "$python" -m tests.gpu.report device || failed=1
    step tests "$python" -m pytest tests/gpu/test_cuda_runs.py tests/gpu/test_device.py -q -p no:cacheprovider || failed=1
    contestants="fused general torch"
    if "$python" -c "import jax; jax.devices('$device')" 2> /dev/null; then contestants="$contestants jax"; fi
    if [ -n "$dry" ]; then
        sizes=(--system cartpole --flow R --batch 8 --repeats 3 --seconds 1)
    else
        sizes=(--system cartpole quantum --flow R C --batch 64 4096 --repeats 5 --seconds 8)
    fi
    # shellcheck disable=SC2086
    step benchmark "$python" -m tests.benchmarks --device "$device" "${sizes[@]}" \
        --contestants $contestants --out "$out/benchmarks" || failed=1
else
    failed=1
    tail -n 5 "$out/environment.log" >&2
    python=${PYTHON:-python3}
fi
"$python" -m tests.gpu.report table "$out" | tee "$out/table.md"
exit $failed
