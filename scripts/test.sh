#!/usr/bin/env bash
# Sets up an environment, then runs linter, types and the whole suite over the cores. With arguments, pytest alone runs:
#
#   scripts/test.sh
#   scripts/test.sh tests/language -k folding
#
# VENV=DIR and PYTHON=EXE as for scripts/setup.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash scripts/setup.sh test
bin=$(cd "${VENV:-.venv}/bin" && pwd)
export PATH="$bin:$PATH" # tests run the installed command
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # workers and the programs that they start share the cores already

status=0
if [ $# -eq 0 ]; then
    ruff check . || status=1
    mypy || status=1
    set -- --numprocesses auto --maxprocesses 8 --dist worksteal
fi
python -m pytest "$@" || status=$?
exit $status
