#!/usr/bin/env bash
# Make .venv in the checkout and install llara_dist with exact pins; a second run with nothing changed does nothing.
# usage: bash launch/setup.sh [dev|flash-attn|liger ...]      PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
python=.venv/bin/python
if [ ! -x "$python" ]; then
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            chosen=$candidate
            break
        fi
    done
    if [ -z "${chosen:-}" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 found; install one or set PYTHON=/path/to/python" >&2
        exit 2
    fi
    "$chosen" -m venv .venv
fi

stamp=.venv/installed-$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)
for extra in core "$@"; do
    [ -e "$stamp-$extra" ] || missing=1
done
[ -n "${missing:-}" ] || exit 0

echo "setting up .venv (a few minutes the first time)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip install -q --upgrade -c launch/constraints.txt pip setuptools
# torch first and alone, so that no other package chooses its build.
"$python" -m pip install -q "$(grep '^torch==' launch/constraints.txt)"
# DeepSpeed's compiled operators are not used.
DS_BUILD_OPS=0 "$python" -m pip install -q -c launch/constraints.txt --no-build-isolation -e ".${extras:+[$extras]}"
find .venv -maxdepth 1 -name 'installed-*' ! -name "${stamp##*/}-*" -delete
for extra in core "$@"; do
    touch "$stamp-$extra"
done
