#!/usr/bin/env bash
# The whole way on the built-in synthetic world; the report is quickstart_out/report.html.
# usage: bash launch/quickstart.sh [--out DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/llara-dist quickstart "$@"
