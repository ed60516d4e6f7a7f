# Sourced by the other scripts: sets ROOT, VENV and PYTHON, and offers install_requirements.
# VENV may name another environment than .venv; PYTHON_BOOTSTRAP the Python (3.10 or newer) that makes it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
PYTHON="$VENV/bin/python"

# install_requirements FILE...: makes the environment if it is not there and installs the files' packages,
# unless they were installed before and have not changed since (so a second run starts at once and needs no network).
install_requirements() {
    local file sum stamp bootstrap="${PYTHON_BOOTSTRAP:-python3}"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        echo "setting up $VENV" >&2
        "$bootstrap" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: Python 3.10 or newer is needed; name it by PYTHON_BOOTSTRAP" >&2
            return 2
        }
        "$bootstrap" -m venv "$VENV" || return
    fi
    for file in "$@"; do
        sum="$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
            "$ROOT/$file")" || return
        stamp="$VENV/.installed-$file"
        if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
            echo "installing $file" >&2
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file" || return
            echo "$sum" >"$stamp"  # only now: an installation that stopped half way starts again
        fi
    done
}
