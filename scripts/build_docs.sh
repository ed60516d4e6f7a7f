#!/usr/bin/env bash
# Build the API reference from the docstrings, with the pages of docs/ beside it.
#
#   bash scripts/build_docs.sh [FOLDER]       # default: docs/html; open FOLDER/index.html
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
folder="$(realpath -m "${1:-$ROOT/docs/html}")"

install_requirements requirements.txt requirements-docs.txt

cd "$ROOT"
# Every module of the library and of the data sets; the checker too, which stands by itself.
PYTHONPATH="$ROOT:$ROOT/scripts" "$PYTHON" -m pdoc --docformat google --no-show-source \
    --output-directory "$folder" utils data check_certificate
echo "API reference: $folder/index.html"
