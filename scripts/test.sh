#!/usr/bin/env bash
# Lint, then tests on all cores; arguments go to pytest. Fails if either does.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
install_requirements requirements.txt requirements-test.txt || exit
cd "$ROOT" || exit

lint=0
"$PYTHON" -m ruff check . || lint=$?
"$PYTHON" -m pytest -q -n auto --dist loadfile "$@" || exit
exit "$lint"
