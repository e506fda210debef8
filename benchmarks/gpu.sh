#!/usr/bin/env bash
# Measure all that needs a GPU, in at most five minutes: tests, networks, loader.
# benchmarks/gpu.sh [FOLDER] writes a file after each case, and all.json and all.md at the end.
# QUICK=1 tries the benchmarks with tiny networks, without a GPU, in ten times the time.
set -u
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
export PYTHONPATH=src
run() { timeout "$1${QUICK:+0}" "${PYTHON:-.venv/bin/python}" "${@:2}" || echo "exit code $?: ${*:2}"; }
mkdir -p "$out"

if [ -n "${QUICK:-}" ]; then
    run 240 benchmarks/speed.py --quick --stages prior upsampler_256 clip --out "$out/networks.json"
else
    run 40 -m pytest -q -m gpu --junitxml="$out/tests.xml"
    run 150 benchmarks/speed.py --sizes karlo paper emoji --minutes 2 --out "$out/networks.json"
    run 55 benchmarks/speed.py --sizes emoji --stages prior decoder --compile --minutes 0.5 \
        --out "$out/compiled.json"
fi
run 45 benchmarks/data.py ${QUICK:+--quick} --out "$out/loader.json"
run 10 benchmarks/results.py "$out"
