"""Scripts run in this process: a new one takes seconds to import torch."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, cwd):
    """(exit code, stdout, stderr) of a script, in a folder."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    argv, folder = sys.argv, os.getcwd()
    sys.argv = [script, *map(str, arguments)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        os.chdir(folder)
    return code, output.getvalue(), errors.getvalue()


def succeed(script, *arguments, cwd):
    """What it prints."""
    code, output, errors = run(script, *arguments, cwd=cwd)
    assert code == 0, errors
    return output


def fail(script, *arguments, cwd):
    """Exit code 2 with one line, which is returned."""
    code, output, errors = run(script, *arguments, cwd=cwd)
    assert code == 2, output + errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line
