"""VNN-LIB as it is written: robustness properties and counter-examples."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from torch import Tensor


def write_robustness(
    path: str | Path, lower: Tensor, upper: Tensor, label: int, num_classes: int, targets: list[int] | None = None
) -> Path:
    """Write the property "some input of the box is not given the label, but one of the targets".

    Args:
        lower, upper: (n,), the box.
        targets: classes that must not win; None for all others.
    """
    path = Path(path)
    targets = [k for k in range(num_classes) if k != label] if targets is None else targets
    lines = [f"; an input of the box whose class is another than {label}: unsat means that there is none", ""]
    lines += [f"(declare-const X_{number} Real)" for number in range(len(lower))]
    lines += [f"(declare-const Y_{number} Real)" for number in range(num_classes)]
    for number, (low, high) in enumerate(zip(lower.tolist(), upper.tolist(), strict=True)):
        lines += [f"(assert (>= X_{number} {decimal(low)}))", f"(assert (<= X_{number} {decimal(high)}))"]
    lines += ["(assert (or", *(f"  (and (>= Y_{target} Y_{label}))" for target in targets), "))"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def decimal(value: float) -> str:
    """All digits of a number, without an exponent, which not every reader knows."""
    return format(Decimal(repr(float(value))), "f")


def counter_example(x: Tensor, y: Tensor) -> str:
    """A counter-example as VNN-COMP has it: ((X_0 v) ... (Y_0 v) ...)."""
    pairs = [f"(X_{number} {value!r})" for number, value in enumerate(x.tolist())]
    pairs += [f"(Y_{number} {value!r})" for number, value in enumerate(y.tolist())]
    return "(" + "\n".join(pairs) + ")\n"
