#!/usr/bin/env bash
# Runs all checks: lint, types, architecture, shell scripts, container file, tests.
# Arguments are passed to pytest, e.g. launch/test.sh tests/unit
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"
install "[dev]"

echo "ruff" && ruff check . && ruff format --check .
echo "mypy" && mypy
echo "import-linter" && lint-imports
echo "shellcheck" && shellcheck launch/*.sh launch/*.sbatch .ci/*
echo "hadolint" && hadolint launch/Containerfile
echo "sphinx" && sphinx-build -W --keep-going -q -b html docs docs/_build/html
tests=(python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile)
tests+=(--no-loadscope-reorder --durations=10)
if [ $# -gt 0 ]; then
    echo "pytest $*" && "${tests[@]}" "$@"
else
    echo "pytest, fast tests" && "${tests[@]}" -m "not slow"
    echo "pytest, slow tests" && "${tests[@]}" -m slow
fi
