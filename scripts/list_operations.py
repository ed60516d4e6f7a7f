"""What the reading of PyTorch modules and ONNX files knows, by name; docs/operations.md is made by it.

python scripts/list_operations.py              # a table to read
python scripts/list_operations.py --markdown   # as docs/operations.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main

# Sound, but with more loss than a relaxation of their own would have.
LOOSE = ("maximum", "minimum", "max", "min", "fmax", "fmin", "addcmul", "multiply", "mul", "Max", "Min", "Mul")
SECTIONS = (
    "functions of PyTorch",
    "views of PyTorch, which move, repeat or drop elements",
    "activations",
    "ONNX operators",
)


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="the page docs/operations.md")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.network.onnx_operators import CONTROL, OPERATORS
from utils.network.reading import read_network  # noqa: F401 - with all operations
from utils.network.trace import LOOKUPS, OPERATIONS, VIEWS
from utils.relaxation import ACTIVATIONS
from utils.relaxation.lines import FAMILIES, MAKERS


def sections() -> dict[str, list[str]]:
    """Names by kind, without the variants of operators that Python has and those in place."""
    functions = sorted({name.lstrip("_") for name in (*OPERATIONS, *LOOKUPS) if not name.startswith("__")})
    views = sorted(name for name in VIEWS if not name.startswith("_"))
    activations = sorted({name.partition("(")[0] for name in (*ACTIVATIONS, *FAMILIES, *MAKERS)})  # families once
    names = (functions, views, activations, sorted({*OPERATORS, *CONTROL}))
    return dict(zip(SECTIONS, names, strict=True))


def marked(names: list[str]) -> list[str]:
    return [f"{name}*" if name in LOOSE else name for name in names]


def main() -> None:
    args = get_args()
    found = sections()
    if args.markdown:
        print("# What is read\n")
        print("Made by `python scripts/list_operations.py --markdown`. What is marked * is sound, but loose; what each")
        print("function may be given is in [models.md](models.md), and for ONNX in [onnx.md](onnx.md).")
    for title, names in found.items():
        if args.markdown:
            print(f"\n## {title[0].upper()}{title[1:]}\n\n{', '.join(f'`{name}`' for name in marked(names))}")
        else:
            print(f"{title} ({len(names)}): {' '.join(marked(names))}\n")


if __name__ == "__main__":
    run_main(main)
