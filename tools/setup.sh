#!/usr/bin/env bash
# Create the virtual environment $1 (default .venv) and install x3mat with the pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

works() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if ! [ -x "$venv/bin/python" ] || ! works "$venv/bin/python"; then
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        for candidate in python3.13 python3.12 python3.11 python3.10 python3 python; do
            if works "$candidate"; then python=$candidate; break; fi
        done
    fi
    if [ -z "$python" ] || ! works "$python"; then
        echo "No Python between 3.10 and 3.13 was found. Install one, or name it:" \
             "make PYTHON=/path/to/python3" >&2
        exit 1
    fi
    echo "Creating $venv with $("$python" -V)"
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        rm -rf "$venv"    # Debian and Ubuntu ship Python without ensurepip
        echo "This Python cannot create environments by itself; trying virtualenv."
        if ! "$python" -m virtualenv --version >/dev/null 2>&1; then
            "$python" -m pip install --user virtualenv ||
            "$python" -m pip install --user --break-system-packages virtualenv || {
                echo "Neither venv nor pip is there. On Debian and Ubuntu:" \
                     "apt-get install python3-venv" >&2
                exit 1
            }
        fi
        "$python" -m virtualenv -q "$venv"
    fi
fi

echo "Installing the pinned packages (the first time takes some minutes)"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile
     -c constraints.txt)
"${pip[@]}" -e ".[mofs,qmof,published,labels,tune,book,test]"
# zeose asks for all of Jupyter; x3mat only reads the database inside it
"${pip[@]}" --no-deps zeose
"$venv/bin/python" -c "import x3mat"
