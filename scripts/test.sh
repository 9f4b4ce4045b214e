#!/usr/bin/env bash
# Sets up .venv if need be, then checks everything: lint, types, tests. Arguments go to pytest:
#   bash scripts/test.sh                   everything, the slow tests included
#   bash scripts/test.sh -m "not slow"     the quick ones
#   bash scripts/test.sh -k lora -x
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
py=$root/.venv/bin/python
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "test: installing Chromium, in which the tests look at reports"
        apt-get install -y -qq chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } ||
            echo "test: Chromium could not be installed"
    else
        echo "test: no Chromium here: the tests that look at reports in a browser are left out"
    fi
fi

echo "test: ruff check"
"$py" -m ruff check .
echo "test: ruff format"
"$py" -m ruff format --check .
echo "test: mypy"
"$py" -m mypy
echo "test: pytest"
# One thread a process, a process a core, each file in one of them: faster than one process with all threads.
OMP_NUM_THREADS=1 "$py" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
