"""The page of what is read is what the script prints, and names what is in the tables."""

from __future__ import annotations

from mnist_files import ROOT
from test_bound_scripts import call


def test_the_page_is_what_the_script_prints():
    done = call("scripts/list_operations.py", "--markdown")
    assert done.code == 0, done.err
    assert done.out == (ROOT / "docs" / "operations.md").read_text()
    for name in ("`gelu`", "`cumsum`", "`maximum*`", "`conv2d`", "`Gemm`", "`silu`"):
        assert name in done.out
