#!/usr/bin/env bash
# Measure all that needs a GPU, in at most five minutes: tests, networks, loader.
# benchmarks/gpu.sh [FOLDER] writes a file after each case, and all.json and all.md at the end.
# QUICK=1 tries it with tiny networks, without a GPU.
set -u
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
quick=${QUICK:+--quick}
export PYTHONPATH=src
mkdir -p "$out"

timeout 45 "$python" -m pytest -q -m gpu --junitxml="$out/tests.xml" || echo "tests: code $?"
timeout 165 "$python" benchmarks/speed.py $quick --sizes karlo paper emoji --minutes 2.2 \
    --out "$out/networks.json" || echo "networks: code $?"
timeout 60 "$python" benchmarks/speed.py $quick --sizes emoji --stages prior decoder --compile \
    --minutes 0.6 --out "$out/networks_compiled.json" || echo "compiled networks: code $?"
timeout 30 "$python" benchmarks/data.py $quick --out "$out/loader.json" || echo "loader: code $?"
"$python" benchmarks/results.py "$out"
