"""What the command-line scripts share: arguments, devices, provenance, and how errors reach the user.

PyTorch takes seconds to import, so it is imported where it is used: --help is answered without.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
TRACEBACK_VARIABLE = "SHOW_TRACEBACK"
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "mlxtend")


class ContradictionError(RuntimeError):
    """Two results that cannot both be true: one of the programs that found them is wrong."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one: "default: None" or "default: False" would tell nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows defaults in --help, takes no abbreviated flags and reports a bad flag in one line."""

    def __init__(self, description: str | None = None):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        """Print one line and exit with code 2, instead of argparse's usage block."""
        self.exit(2, f"error: {one_line(message)} (see --help)\n")


def add_common_arguments(
    parser: argparse.ArgumentParser, data: str = "folder that holds MNIST/raw (default: data/)"
) -> None:
    """Add --data-dir, which ``data`` describes, --seed, --device, --cuda, --threads and --dry-run."""
    group = parser.add_argument_group("common")
    group.add_argument("--data-dir", type=Path, metavar="FOLDER", help=data)
    group.add_argument("--seed", type=non_negative_int, default=0, help="seed of every random choice")
    group.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:K")
    group.add_argument("--cuda", action="store_true", help="short for --device cuda")
    group.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    group.add_argument("--dry-run", action="store_true", help="go through one tiny step and write nothing")


def apply_common_arguments(args: argparse.Namespace) -> torch.device:
    """Seed torch, set its thread count and return the device. Raises ValueError if the device is not there.

    On a GPU, too, products of float32 are of float32 from now on.
    """
    import torch

    from ..precision import use_full_precision

    device = resolve_device(args)
    use_full_precision()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return device


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device of --device/--cuda. Raises ValueError if its name is unknown or it is not available."""
    import torch

    name = "cuda" if args.cuda and args.device == "cpu" else args.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use cpu, cuda or cuda:K") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use cpu, cuda or cuda:K")
    if args.cuda and device.type != "cuda":
        raise ValueError(f"--cuda contradicts --device {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA was asked for, but this torch finds no CUDA device: leave out --cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name}: {torch.cuda.device_count()} CUDA device(s) found")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # started by torchrun
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _integer(text, 1)


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = _finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = _finite(text)
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def finite(text: str) -> float:
    """argparse type: a finite number."""
    value = _finite(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def norm_value(text: str) -> float:
    """argparse type: the order of an l_p norm, one of 1, 2 and inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value not in (1.0, 2.0, math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a supported norm: use 1, 2 or inf")
    return value


def norm_or_count(text: str) -> float:
    """argparse type: as ``norm_value``, or 0, where changes are counted."""
    return 0.0 if text.strip() in ("0", "0.0") else norm_value(text)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; packages that are missing are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The metadata leave out the build (cpu, cu126), which can change the last digits of a result.
    import torch

    return found | {"torch": str(torch.__version__)}


def git_commit(root: Path = ROOT) -> str | None:
    """Hash of the commit that is checked out at root; None if root is not the top of a git repository."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[1] if Path(answer[0]).resolve() == Path(root).resolve() else None


def utc_now() -> str:
    """Date and time as records hold them."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def json_value(value: object) -> object:
    """A value as JSON takes it: paths in the repository relative to its root, infinities as words."""
    if isinstance(value, (list, tuple)):
        return [json_value(entry) for entry in value]
    if isinstance(value, Path):
        resolved = value.resolve()
        return str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved)
    return f"{value:g}" if isinstance(value, float) and not math.isfinite(value) else value


def run_facts(args: argparse.Namespace, device: torch.device, dtype: str = "float64") -> dict[str, object]:
    """What the record of every bound run says: the arguments, and what it runs on."""
    return {
        "arguments": {name: json_value(value) for name, value in sorted(vars(args).items())},
        "device": str(device),
        "dtype": dtype,
        "versions": versions(),
        "commit": git_commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "started": utc_now(),
    }


def checkpoint_facts(path: Path, name: str, config: dict) -> dict[str, object]:
    """What the record of a bound run says about its model."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "path": json_value(path), "sha256": sha256, "config": config}


def one_line(message: object) -> str:
    """The message with all runs of white space, line breaks included, made single spaces."""
    return " ".join(str(message).split())


def describe_error(error: BaseException) -> str:
    """One line for the user; a file error names the file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(error) or type(error).__name__


def answer_early(get_args: Callable[[], object]) -> None:
    """Answer --help and mistyped flags before a script imports what takes seconds; Ctrl-C meanwhile ends in one line.

    What imports may be interrupted in has nothing to clean up, and some turn Ctrl-C into errors of their own.
    """
    get_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(); what a user can cause ends in one line on stderr, without a traceback.

    ValueError (CheckpointError and DataError are ones) and OSError exit with code 2, ContradictionError with 3, Ctrl-C
    with 130. Anything else is a mistake in the program and keeps its traceback. SHOW_TRACEBACK=1 in the environment
    shows them all.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get(TRACEBACK_VARIABLE):
        return main()
    try:
        main()
    except (ValueError, OSError) as error:
        _fail(f"error: {describe_error(error)}", 2)
    except ContradictionError as error:
        _fail(f"CONTRADICTION: {describe_error(error)}", 3)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(line: str, code: int) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr)
    sys.exit(code)
