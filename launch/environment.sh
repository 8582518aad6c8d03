# shellcheck shell=bash
# Sourced by the other scripts: changes to the repository's root and puts the virtual environment
# first in PATH. VENV is its folder (.venv), created if missing with PYTHON (python3, 3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

# install EXTRA: install this checkout and its requirements into the environment.
install() {
    if [ ! -x "$VENV/bin/python" ]; then
        echo "creating the virtual environment $VENV"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    PATH=$(cd "$VENV/bin" && pwd):$PATH
    export PATH
    echo "installing dist_graft and its requirements into $VENV (the first time, torch takes minutes)"
    python -m pip install --quiet --disable-pip-version-check --editable ".$1"
}
