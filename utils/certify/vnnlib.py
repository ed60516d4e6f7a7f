"""VNN-LIB 1.0 properties: input boxes and what must not happen to the outputs in them.

A property describes the counter-examples: it is "sat" if some input X in its boxes makes the outputs Y satisfy its
constraints, and "unsat", which is what a safe network gives, if none does. Read are declarations of X_i and Y_j, and
assertions of <= and >= between sums of outputs, inputs and numbers, nested in "and" and "or".
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor

MAX_CASES = 100_000
TOKEN = re.compile(r"[()]|[^\s()]+")
VARIABLE = re.compile(r"([XY])_(\d+)")


class PropertyError(ValueError):
    """A property that cannot be read; the message is one line."""


@dataclass
class Case:
    """A box of inputs, lower and upper (n,), and conjunctions of output constraints: ``rows @ Y <= limits`` each.

    A counter-example is an X in the box whose Y satisfies all constraints of some conjunction.
    """

    lower: Tensor
    upper: Tensor
    conjunctions: list[tuple[Tensor, Tensor]]


@dataclass
class Property:
    num_inputs: int
    num_outputs: int
    cases: list[Case]

    def holds_for(self, x: Tensor, y: Tensor, tolerance: float = 0.0) -> bool:
        """Whether input x, (n,), with outputs y, (m,), is a counter-example."""
        for case in self.cases:
            inside = bool(((x >= case.lower - tolerance) & (x <= case.upper + tolerance)).all())
            for rows, limits in case.conjunctions:
                if inside and bool((rows @ y <= limits + tolerance * (1.0 + limits.abs())).all()):
                    return True
        return False

    @property
    def compares_outputs_only(self) -> bool:
        """Whether all constraints are of the form Y_i <= Y_j, which no softmax changes."""
        parts = [part for case in self.cases for part in case.conjunctions]
        for rows, limits in parts:
            ordered = rows.sort(dim=1).values
            pairs = (ordered[:, 0] == -1) & (ordered[:, -1] == 1) & ((rows != 0).sum(dim=1) == 2)
            if not bool(((limits == 0) & pairs).all()):
                return False
        return True


# --- reading ----------------------------------------------------------------------------------------------------------

Linear = dict[str, float]  # coefficients by variable; the constant is that of ""
Conjunction = list[Linear]  # each <= 0


def read_vnnlib(path: str | Path) -> Property:
    """The property of a file.

    Raises:
        PropertyError: it is no VNN-LIB property, or has something else than boxes and linear output constraints.
    """
    path = Path(path)
    try:
        return parse_vnnlib(path.read_text())
    except (PropertyError, UnicodeDecodeError, RecursionError) as error:
        raise PropertyError(f"{path}: {' '.join(str(error).split())}") from error


def parse_vnnlib(text: str) -> Property:
    """The property of a text; see ``read_vnnlib``."""
    declared: dict[str, set[int]] = {"X": set(), "Y": set()}
    formulas = [[[]]]
    for command in _expressions(text):
        match command:
            case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                kind, number = _variable(name)
                if number in declared[kind]:
                    raise PropertyError(f"{name} is declared twice")
                declared[kind].add(number)
            case ["assert", formula]:
                formulas.append(_cases(formula, declared))
            case ["set-logic" | "set-info" | "set-option" | "check-sat" | "get-model" | "exit", *_]:
                pass
            case _:
                raise PropertyError(f"{_shown(command)} is not understood")
    counts = {}
    for kind, numbers in declared.items():
        counts[kind] = len(numbers)
        if not numbers or numbers != set(range(len(numbers))):
            raise PropertyError(f"{kind}_0, {kind}_1 ... must be declared without a gap")
    boxes: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for conjunction in _product(formulas):
        box, rows, limits = _split(conjunction, counts)
        if all(low <= high for low, high in zip(*box, strict=True)):
            boxes.setdefault(box, []).append((rows, limits))
    cases = [Case(_vector(low), _vector(high), parts) for (low, high), parts in boxes.items()]
    return Property(counts["X"], counts["Y"], cases)


def _vector(numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _expressions(text: str) -> list:
    """Nested lists of the text's words; comments go from ; to the end of the line."""
    stack: list[list] = [[]]
    for token in TOKEN.findall(re.sub(r";[^\n]*", "", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise PropertyError("a parenthesis closes that was not opened")
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise PropertyError("a parenthesis is not closed")
    return stack[0]


def _shown(expression) -> str:
    text = expression if isinstance(expression, str) else f"({' '.join(_shown(part) for part in expression)})"
    return text if len(text) <= 80 else text[:77] + "..."


def _variable(name: str) -> tuple[str, int]:
    match = VARIABLE.fullmatch(name)
    if match is None:
        raise PropertyError(f"{name} is no input X_i or output Y_j")
    return match[1], int(match[2])


def _cases(formula, declared: dict[str, set[int]]) -> list[Conjunction]:
    """The formula as a disjunction of conjunctions."""
    match formula:
        case ["and", *parts]:
            return _product([_cases(part, declared) for part in parts])
        case ["or", *parts]:
            return [case for part in parts for case in _cases(part, declared)]
        case ["<=" | ">=" as relation, left, right]:
            low, high = (left, right) if relation == "<=" else (right, left)
            return [[_combined(_linear(low, declared), _linear(high, declared), -1.0)]]
        case _:
            raise PropertyError(f"{_shown(formula)} is not understood: use and, or, <= and >=")


def _product(formulas: list[list[Conjunction]]) -> list[Conjunction]:
    """A conjunction of disjunctions, multiplied out; those with one alternative, the most, cost nothing."""
    common = [part for cases in formulas if len(cases) == 1 for part in cases[0]]
    choices = [cases for cases in formulas if len(cases) != 1]
    if math.prod(len(cases) for cases in choices) > MAX_CASES:
        raise PropertyError(f"its disjunctions multiply to more than {MAX_CASES} cases")
    return [common + [part for case in chosen for part in case] for chosen in itertools.product(*choices)]


def _linear(expression, declared: dict[str, set[int]]) -> Linear:
    """Coefficients of a sum of variables and numbers."""
    match expression:
        case str(text):
            if text[0] in "XY":
                kind, number = _variable(text)
                if number not in declared[kind]:
                    raise PropertyError(f"{text} is not declared")
                return {text: 1.0}
            return {"": _number(text)}
        case ["+", *parts]:
            total: Linear = {}
            for part in parts:
                total = _combined(total, _linear(part, declared), 1.0)
            return total
        case ["-", part]:
            return _combined({}, _linear(part, declared), -1.0)
        case ["-", first, *parts]:
            return _combined(_linear(first, declared), _linear(["+", *parts], declared), -1.0)
        case ["*", *parts]:
            factors = [_linear(part, declared) for part in parts]
            variable = [factor for factor in factors if set(factor) - {""}]
            if len(variable) > 1:
                raise PropertyError(f"{_shown(expression)} is not linear")
            number = math.prod(factor[""] for factor in factors if factor not in variable)
            return _combined({}, variable[0] if variable else {"": 1.0}, number)
        case _:
            raise PropertyError(f"{_shown(expression)} is not understood")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PropertyError(f"{text} is no number")
    return value


def _combined(first: Linear, second: Linear, factor: float) -> Linear:
    total = dict(first)
    for name, value in second.items():
        total[name] = total.get(name, 0.0) + factor * value
    return total


def _split(conjunction: Conjunction, counts: dict[str, int]) -> tuple[tuple, Tensor, Tensor]:
    """The box of a conjunction, (lower, upper), and its output constraints: rows and limits."""
    lower, upper = [-math.inf] * counts["X"], [math.inf] * counts["X"]
    outputs: list[tuple[dict[int, float], float]] = []
    for constraint in conjunction:
        names = [name for name, value in constraint.items() if name and value != 0.0]
        limit = -constraint.get("", 0.0)
        inputs = [name for name in names if name[0] == "X"]
        if not inputs:
            outputs.append(({_variable(name)[1]: constraint[name] for name in names}, limit))
            continue
        if len(names) > 1:
            raise PropertyError(f"inputs are supported in bounds X_i <= number only, not with {', '.join(names[:3])}")
        number, factor = _variable(inputs[0])[1], constraint[inputs[0]]
        if factor > 0:
            upper[number] = min(upper[number], limit / factor)
        else:
            lower[number] = max(lower[number], limit / factor)
    for number, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PropertyError(f"X_{number} has no {'upper' if math.isfinite(low) else 'lower'} bound")
    rows = torch.zeros(len(outputs), counts["Y"], dtype=torch.float64)
    for row, (coefficients, _) in enumerate(outputs):
        for number, value in coefficients.items():
            rows[row, number] = value
    return (tuple(lower), tuple(upper)), rows, _vector([limit for _, limit in outputs])


# --- writing ----------------------------------------------------------------------------------------------------------


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
