"""The structure of utils/: imports point down, packages and modules stay small, --help needs nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from mnist_files import ROOT

UTILS = ROOT / "utils"
MODULES = sorted(UTILS.rglob("*.py"))
MAX_LINES, MAX_MODULES = 400, 12
READERS = {"trace.py", "symbolic.py"}  # of modules: a line or two an operation
HEAVY = ("torch", "scipy", "matplotlib")
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("vanilla_rnn", "lstm", "gru", "mlp", "cnn", "transformer", "scripts", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.relative_to(UTILS).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """The modules of utils/ that a module imports anywhere, for types too."""
    found = set()
    package = list(path.relative_to(UTILS).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in NAMES else ".".join(base))
    return found


def test_modules_of_utils_import_each_other_by_relative_names():
    """So that the same files work under the name that an installation gives them."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "utils" for name in names), path


def test_no_two_modules_import_each_other():
    order = list(graphlib.TopologicalSorter({module_name(path): imports_of(path) for path in MODULES}).static_order())
    assert set(order) >= NAMES


def test_no_two_packages_import_each_other():
    packages: dict[str, set[str]] = {}
    for path in MODULES:
        package = module_name(path).split(".")[0]
        packages.setdefault(package, set()).update(name.split(".")[0] for name in imports_of(path))
    packages = {name: found - {name} for name, found in packages.items() if name}
    list(graphlib.TopologicalSorter(packages).static_order())


def test_a_circle_would_be_noticed():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_modules_and_packages_stay_small():
    long = {path.name for path in MODULES if len(path.read_text().splitlines()) > MAX_LINES}
    assert long <= READERS, f"longer than {MAX_LINES} lines: {long - READERS}"
    for package in {path.parent for path in MODULES}:
        modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES, f"{package.name} has {len(modules)} modules"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    code = (
        "import atexit, runpy, sys; sys.argv[1:] = ['--help']; "
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])); "
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout and done.stdout.endswith("HEAVY []\n")


def test_packages_are_installed_with_all_that_is_in_them():
    """pyproject.toml names packages one by one; one that it names needs those inside of it."""
    text = (ROOT / "pyproject.toml").read_text()
    named = {line.strip(' ",') for line in text.splitlines() if line.startswith('    "seqcert.')}
    assert "seqcert.bounds" in named
    for name in named:
        folder = UTILS.joinpath(*name.split(".")[1:])
        inside = {f"{name}.{path.parent.name}" for path in folder.glob("*/__init__.py")}
        assert inside <= named, f"pyproject.toml leaves out {inside - named}"
