#!/usr/bin/env bash
# All checks of the project: lint, types, architecture, shell scripts, image, tests.
# Arguments go to pytest, e.g. launch/test.sh tests/unit
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"
install "[dev]"

echo "ruff" && ruff check . && ruff format --check .
echo "mypy" && mypy
echo "import-linter" && lint-imports
echo "shellcheck" && shellcheck launch/*.sh launch/*.sbatch .ci/run
echo "hadolint" && hadolint launch/Containerfile
echo "pytest" && python -m pytest "$@"
