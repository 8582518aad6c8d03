# shellcheck shell=bash
# Sourced by the other scripts, not run: goes to the repository's root and puts the virtual
# environment's programs first. $VENV names the environment, .venv otherwise; it is made if missing.
# $PYTHON names the Python (3.11 or newer) that makes it.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

# install EXTRA: put this checkout and what it needs into the environment.
install() {
    if [ ! -x "$VENV/bin/python" ]; then
        echo "making the virtual environment $VENV"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    PATH=$(cd "$VENV/bin" && pwd):$PATH
    export PATH
    echo "installing dist_graft and what it needs into $VENV (the first time torch takes minutes)"
    python -m pip install --quiet --disable-pip-version-check --editable ".$1"
}
