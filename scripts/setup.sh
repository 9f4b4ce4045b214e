#!/usr/bin/env bash
# Makes .venv, installs hftl there with its `dev` and `builtin` extras, and prepares the built-in data and weights.
# A second run has nothing to do and returns at once. PYTHON=python3.12 picks the interpreter for a new .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
py=$venv/bin/python
python=${PYTHON:-python3}

if ! "$py" -c '' 2>/dev/null; then
    command -v "$python" >/dev/null || { echo "error: no $python here; set PYTHON to Python 3.10 or newer" >&2; exit 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $("$python" --version) is too old; set PYTHON to Python 3.10 or newer" >&2
        exit 2
    }
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        echo "error: could not make .venv; on Debian and Ubuntu, install the package python3-venv" >&2
        exit 2
    }
fi

# What the environment was made from: the dependencies, and the folder, which the editable install points to.
stamp=$venv/.hftl-installed
state="$root $(cksum <pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "setup: installing hftl and what it needs into .venv (the first time, PyTorch makes this a large download)"
    "$py" -m pip install -q --disable-pip-version-check -e ".[dev,builtin]"
    printf '%s\n' "$state" >"$stamp"
fi

"$py" -m hftl.builtin
