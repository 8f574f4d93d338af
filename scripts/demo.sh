#!/usr/bin/env bash
# Sets up an environment where there is none, then shows a whole transfer: train, save, inspect, plan, load, compare.
# Arguments go to `ckptsurgery demo` (see --help). VENV=DIR and PYTHON=EXE as for scripts/setup.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/ckptsurgery" demo "$@"
