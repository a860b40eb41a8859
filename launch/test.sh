#!/usr/bin/env bash
# The test suite: the quick part by default, all of it with --all. Further arguments go to pytest.
# usage: bash launch/test.sh [--all] [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
select=(-m "not long and not gpu")
if [ "${1:-}" = "--all" ]; then
    shift
    select=(-m "not gpu or gpu")
fi
# One thread a process, two processes: faster on small models than two threads. A file's tests stay in one process,
# because they share what its fixtures made.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n "${LLARA_DIST_TEST_PROCESSES:-2}" --dist loadfile "${select[@]}" "$@"
