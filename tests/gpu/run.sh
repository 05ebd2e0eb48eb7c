#!/usr/bin/env bash
# All that a machine with a CUDA device can show, in one table: device, tests, benchmark. Needs Python ≥ 3.11 and torch.
#
#   tests/gpu/run.sh [--wheels FOLDER] [--out FOLDER] [--limit SECONDS] [--dry]
#
# --wheels  a folder of wheels to install from, without a network: warp-lang, numpy, pytest; pytest-xdist and jax if wanted
# --out     where the table, logs and the environment go (out/gpu)
# --limit   seconds after which all of it stops (470); what was found by then is in the table
# --dry     on a CPU: the same steps, each as small as it can be, to see that they work
#
# Status 0 where every step passed, 1 where one failed or ran out of time, 2 for a mistake in the arguments or too old a
# Python. PYTHON says which Python to use (python3). Tests leave the benchmark three tenths of the time.
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

outer=${PYTHON:-python3}
"$outer" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, got " + sys.version.split()[0])' ||
    exit 2
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/*.log "$out"/steps.csv
rm -rf "$out/benchmarks"
export WARP_PHYS_GPU_DRY="$dry" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=cuda
[ -z "$dry" ] || device=cpu
python="$out/venv/bin/python"

# step NAME RESERVE COMMAND…: at most what is left of the time without a reserve; its output is in NAME.log, its end in
# steps.csv. What runs out of time is interrupted as by Ctrl-C, so that it says what it has found.
step() {
    local name=$1 left=$((limit - SECONDS - $2)) begun=$SECONDS status
    shift 2
    if [ "$left" -le 0 ]; then
        echo "$name,no time left,0" >> "$out/steps.csv"
        return 1
    fi
    timeout --signal=INT --kill-after=10 "$left" "$@" > "$out/$name.log" 2>&1
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="out of time" ;;
        *) status="failed ($status)" ;;
    esac
    echo "$name,$status,$((SECONDS - begun))" >> "$out/steps.csv"
    [ "$status" = passed ]
}

# lacks MODULE…: those that the environment cannot import
lacks() {
    for module; do "$python" -c "import $module" > /dev/null 2>&1 || echo "$module"; done | xargs
}

environment() {
    local own missing install
    own="Python $("$outer" -c 'import platform; print(platform.python_version(), "on", platform.machine())')"
    # --without-pip: a machine without ensurepip makes one too; packages then go in by the pip that python has
    "$outer" -m venv --system-site-packages --without-pip "$out/venv" || { echo "$own has no module venv"; return 1; }
    # what python has is seen where it is in an environment of its own, too
    "$outer" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth" || return 1
    [ -z "$(lacks torch)" ] || { echo "$own has no torch that can be imported; it is not installed from wheels"; return 1; }
    if [ -n "$wheels" ]; then
        "$outer" -m pip --version || { echo "$own has no pip, which --wheels needs"; return 1; }
        install=("$outer" -m pip --python "$python" install --disable-pip-version-check --no-index --find-links "$wheels")
        "${install[@]}" warp-lang numpy pytest
        for wanted in pytest-xdist jax; do "${install[@]}" "$wanted" || echo "without $wanted"; done
    fi
    missing=$(lacks warp numpy pytest)
    [ -z "$missing" ] || { echo "$own lacks $missing: --wheels must name a folder with their wheels for it"; return 1; }
}
export -f environment lacks
export out wheels python outer

failed=1
contestants=(fused general torch)
if [ -n "$dry" ]; then
    processes=2 sizes=(--system cartpole --flow R --batch 8 --repeats 3 --seconds 1)
else
    processes=4 sizes=(--system cartpole quantum --flow R C --batch 64 4096 --repeats 5 --seconds 8)
fi
if step environment 0 bash -c environment && step device 0 "$python" -m tests.gpu.report device; then
    failed=0
    together=()
    [ -n "$(lacks xdist)" ] || together=(--numprocesses "$processes")
    # one line for each test: what was interrupted shows them too
    step tests $((limit * 3 / 10)) "$python" -m pytest tests/gpu/test_device.py tests/gpu/test_cuda_runs.py -v --tb=short \
        -p no:cacheprovider "${together[@]}" || failed=1
    if "$python" -c "import jax; jax.devices('$device')" 2> /dev/null; then contestants+=(jax); fi
    step benchmark 0 "$python" -m tests.benchmarks --device "$device" "${sizes[@]}" \
        --contestants "${contestants[@]}" --out "$out/benchmarks" || failed=1
else
    log=$out/environment.log
    [ -e "$out/device.log" ] && log=$out/device.log
    [ -e "$log" ] && tail -n 1 "$log" >&2
    python=$outer
fi
"$python" -m tests.gpu.report table "$out" | tee "$out/table.md"
exit $failed
