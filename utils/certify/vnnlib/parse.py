"""VNN-LIB as it is read: a text becomes a property.

Read are declarations of X_i and Y_j, or VNN-LIB 2.0's of one network, and assertions of <=, >=, <, > and = between sums
of outputs, inputs and numbers, nested in "and" and "or". Sums of numbers are exact; what is left of them is rounded to
the nearest float64.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ...clock import now
from ...runs.unpack import unpacked
from .properties import Case, Property

MAX_CASES = 100_000
TOKEN = re.compile(r""";[^\n]*|"[^"]*"|\|[^|]*\||\[[^\[\]()]*\]|[()]|[^\s()\[\];"|]+|\S""")
VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]*)")
ELEMENT = re.compile(r"(\w+)\[((?:[0-9]+(?:,[0-9]+)*)?)\]", re.ASCII)  # of VNN-LIB 2.0
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?")
MAX_EXPONENT = 400  # float64 holds numbers up to 1e308 and down to 5e-324
SMALLEST_FACTOR = 1e-290  # below, float64 has fewer digits
MAX_DIGITS, MAX_ELEMENTS = 1000, 10_000_000


class PropertyError(ValueError):
    """A property that cannot be read; the message is one line."""


Variable = tuple[str, int]  # X or Y, and its number
CONSTANT: Variable = ("", 0)
Linear = dict[Variable, Fraction]  # coefficients, exact


@dataclass(frozen=True)
class Bound:
    """X_number <= value, or >= if not ``upper``; < or > if strict."""

    number: int
    upper: bool
    value: Fraction
    strict: bool


@dataclass(frozen=True)
class Row:
    """``sum coefficients * variables <= limit``; if strict, the limit is the float64 below what is not reached."""

    coefficients: tuple[tuple[Variable, float], ...]
    limit: float
    strict: bool


Conjunction = list[Bound | Row]


def read_vnnlib(path: str | Path, deadline: float = math.inf) -> Property:
    """The property of a file, which gzip may have packed.

    Raises:
        TimeoutError: the deadline, of ``utils.clock``, is over.
        PropertyError: it is no VNN-LIB property, or has something else than boxes and linear constraints.
    """
    path = Path(path)
    try:
        return parse_vnnlib(unpacked(path).decode("utf-8-sig"), deadline)
    except (PropertyError, UnicodeDecodeError, RecursionError) as error:
        raise PropertyError(f"{path}: {' '.join(str(error).split())}") from error


def parse_vnnlib(text: str, deadline: float = math.inf) -> Property:
    """The property of a text; see ``read_vnnlib``."""
    names: dict[str, Variable] = {}
    formulas: list[list[Conjunction]] = [[[]]]
    shape = None
    for command in _expressions(text):
        _check_clock(deadline)
        match command:
            case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                if name in names:
                    raise PropertyError(f"{name} is declared twice")
                names[name] = _variable(name)
            case ["declare-network", str(), *parts] if not names:
                shape = _declare_tensors(parts, names)
            case ["declare-network", *_]:
                raise PropertyError("a second network or input is declared: one is supported")
            case ["assert", formula]:
                formulas.append(_cases(formula, names))
            case ["set-logic" | "set-info" | "set-option" | "check-sat" | "get-model" | "exit" | "vnnlib-version", *_]:
                pass
            case _:
                raise PropertyError(f"{_shown(command)} is not understood")
    counts = {}
    for kind in "XY":
        numbers = {number for own, number in names.values() if own == kind}
        counts[kind] = len(numbers)
        if not numbers or numbers != set(range(len(numbers))):
            raise PropertyError(f"{kind}_0, {kind}_1 ... must be declared without a gap")
    boxes: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    columns = _columns(formulas, counts)
    for conjunction in _product(formulas):
        _check_clock(deadline)
        box = _box([atom for atom in conjunction if isinstance(atom, Bound)], counts["X"])
        if box is not None:
            rows = [atom for atom in conjunction if isinstance(atom, Row)]
            boxes.setdefault(box, []).append(_rows(rows, columns))
    cases = [
        Case(_vector(box[0]), _vector(box[1]), parts, _vector(box[2]), _vector(box[3])) for box, parts in boxes.items()
    ]
    strict = any(atom.strict for cases in formulas for conjunction in cases for atom in conjunction)
    return Property(counts["X"], counts["Y"], cases, strict, shape)


def _check_clock(deadline: float) -> None:
    if now() > deadline:
        raise TimeoutError("the time limit is reached")


def _vector(numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _expressions(text: str) -> list:
    """Nested lists of the text's words; comments go from ; to the end of the line, an index belongs to its tensor."""
    stack: list[list] = [[]]
    for token in TOKEN.findall(text):
        if token[0] == ";":
            continue
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise PropertyError("a parenthesis closes that was not opened")
            stack[-2].append(stack.pop())
        elif token[0] == "[" and stack[-1] and isinstance(stack[-1][-1], str):
            stack[-1][-1] += re.sub(r"\s", "", token)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise PropertyError("a parenthesis is not closed")
    return stack[0]


def _shown(expression) -> str:
    text = expression if isinstance(expression, str) else f"({' '.join(_shown(part) for part in expression)})"
    return text if len(text) <= 80 else text[:77] + "..."


def _variable(name: str) -> Variable:
    """Each variable has one spelling: Y_00 is none."""
    match = VARIABLE.fullmatch(name)
    if match is None:
        raise PropertyError(f"{name} is no input X_i or output Y_j, numbered 0, 1, 2 ...")
    return match[1], int(match[2])


def _declare_tensors(parts: list, names: dict[str, Variable]) -> tuple[int, ...]:
    """Enter the elements of VNN-LIB 2.0's input and output tensors, in row-major order; the shape of the input."""
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: set[str] = set()
    for part in parts:
        match part:
            case ["declare-input" | "declare-output" as command, str(name), str(kind)]:
                letter = "X" if command == "declare-input" else "Y"
                found = ELEMENT.fullmatch(kind)
            case _:
                raise PropertyError(f"{_shown(part)} is not supported: declare one input and one output")
        if re.fullmatch(r"[A-Za-z]\w*", name) is None:
            raise PropertyError(f"{name} is no name of a tensor")
        if name in tensors:
            raise PropertyError(f"{name} is declared twice")
        tensors.add(name)
        if letter in shapes:
            raise PropertyError(f"{_shown(part)}: one input and one output are supported")
        if found is None or found[1].lower() not in ("real", "float", "float32", "float64"):
            raise PropertyError(f"{_shown(part)}: the type must be real, float32 or float64, with a shape like [1,5]")
        shapes[letter] = tuple(int(size) for size in found[2].split(",")) if found[2] else ()
        if math.prod(shapes[letter]) > MAX_ELEMENTS:
            raise PropertyError(f"{_shown(part)} is too large")
        for number, index in enumerate(itertools.product(*map(range, shapes[letter]))):
            names[f"{name}[{','.join(map(str, index))}]" if index else name] = (letter, number)
    return shapes.get("X")


def _cases(formula, names: dict[str, Variable]) -> list[Conjunction]:
    """The formula as a disjunction of conjunctions."""
    match formula:
        case ["and", *parts]:
            return _product([_cases(part, names) for part in parts])
        case ["or", *parts]:
            return [case for part in parts for case in _cases(part, names)]
        case ["<=" | ">=" | "<" | ">" as relation, str(left), str(right)] if _is_bound(left, right, names):
            return [
                [Bound(names[left][1], relation[0] == "<", _number(right), len(relation) == 1)]
            ]  # most are: be quick
        case ["<=" | ">=" | "<" | ">" | "=" | "==" as relation, *parts] if len(parts) >= 2:
            values = [_linear(part, names) for part in parts]
            pairs = list(itertools.pairwise(values if relation[0] != ">" else values[::-1]))
            if relation[0] == "=":
                pairs += [pair[::-1] for pair in pairs]
            atoms = [_atom(_combined(low, high, -1), relation in ("<", ">")) for low, high in pairs]
            return [] if False in atoms else [[atom for atom in atoms if atom is not True]]
        case ["!=", left, right]:
            return [*_cases(["<", left, right], names), *_cases([">", left, right], names)]
        case _:
            raise PropertyError(f"{_shown(formula)} is not understood: use and, or, <=, >=, <, > and =")


def _is_bound(left: str, right: str, names: dict[str, Variable]) -> bool:
    return names.get(left, CONSTANT)[0] == "X" and NUMBER.fullmatch(right) is not None and right not in names


def _product(formulas: list[list[Conjunction]]) -> list[Conjunction]:
    """A conjunction of disjunctions, multiplied out; those with one alternative, the most, cost nothing."""
    common = [part for cases in formulas if len(cases) == 1 for part in cases[0]]
    choices = [cases for cases in formulas if len(cases) != 1]
    if math.prod(len(cases) for cases in choices) > MAX_CASES:
        raise PropertyError(f"its disjunctions multiply to more than {MAX_CASES} cases")
    return [common + [part for case in chosen for part in case] for chosen in itertools.product(*choices)]


def _linear(expression, names: dict[str, Variable]) -> Linear:
    """Coefficients of a sum of variables and numbers."""
    match expression:
        case str(text):
            if text in names:
                return {names[text]: Fraction(1)}
            if re.match(r"[XY]_|\w+\[", text):
                raise PropertyError(f"{text} is not declared")
            return {CONSTANT: _number(text)}
        case ["+", *parts]:
            total: Linear = {}
            for part in parts:
                total = _combined(total, _linear(part, names), 1)
            return total
        case ["-", part]:
            return _combined({}, _linear(part, names), -1)
        case ["-", first, *parts]:
            return _combined(_linear(first, names), _linear(["+", *parts], names), -1)
        case ["*", *parts]:
            factors = [_linear(part, names) for part in parts]
            variable = [factor for factor in factors if set(factor) - {CONSTANT}]
            if len(variable) > 1:
                raise PropertyError(f"{_shown(expression)} is not linear")
            number = math.prod(factor.get(CONSTANT, Fraction(0)) for factor in factors if factor not in variable)
            return _combined({}, variable[0] if variable else {CONSTANT: Fraction(1)}, number)
        case _:
            raise PropertyError(f"{_shown(expression)} is not understood")


def _number(text: str) -> Fraction:
    match = NUMBER.fullmatch(text)
    if match is None:
        raise PropertyError(f"{text} is no number")
    if len(text) > MAX_DIGITS or abs(int(match[1] or 0)) > MAX_EXPONENT:
        raise PropertyError(f"{_shown(text)} is too large or too small a number")
    return Fraction(Decimal(text))


def _float(value: Fraction) -> float:
    """The nearest float64."""
    try:
        return float(value)
    except OverflowError:
        raise PropertyError("a number is too large for float64") from None


def _combined(first: Linear, second: Linear, factor: int | Fraction) -> Linear:
    total = dict(first)
    for name, value in second.items():
        total[name] = total.get(name, 0) + factor * value
    return total


def _atom(constraint: Linear, strict: bool) -> Bound | Row | bool:
    """``constraint <= 0``, or < 0, as a bound of one input, a row, or, of numbers alone, whether it holds."""
    limit = -constraint.get(CONSTANT, Fraction(0))
    factors = {name: value for name, value in constraint.items() if name != CONSTANT and value != 0}
    if not factors:
        return limit > 0 or (limit == 0 and not strict)
    if len(factors) == 1:
        ((kind, number), factor) = next(iter(factors.items()))
        if kind == "X":
            return Bound(number, factor > 0, limit / factor, strict)
    coefficients = {name: _float(value) for name, value in factors.items()}
    if any(abs(value) < SMALLEST_FACTOR for value in coefficients.values()):
        raise PropertyError("a factor of a variable is too small for float64")
    limit = _float(limit)
    return Row(tuple(coefficients.items()), math.nextafter(limit, -math.inf) if strict else limit, strict)


def _columns(formulas: list[list[Conjunction]], counts: dict[str, int]) -> dict[str, range]:
    """Where the rows of a property have the outputs and, if any constraint is of them, the inputs."""
    rows = (atom for cases in formulas for part in cases for atom in part if isinstance(atom, Row))
    compared = any(kind == "X" for row in rows for (kind, _), _ in row.coefficients)
    return {"Y": range(counts["Y"]), "X": range(counts["Y"], counts["Y"] + counts["X"] * compared)}


def _box(bounds: list[Bound], count: int) -> tuple[tuple[float, ...], ...] | None:
    """(lower, upper, inner lower, inner upper) of a conjunction, or None if it is empty."""
    tightest: dict[tuple[int, bool], Bound] = {}
    for bound in bounds:
        key = (bound.number, bound.upper)
        old = tightest.get(key)
        inside = old is None or (bound.value < old.value if bound.upper else bound.value > old.value)
        if inside or (bound.strict and bound.value == old.value):
            tightest[key] = bound
    ends = []
    for number in range(count):
        low, high = tightest.get((number, False)), tightest.get((number, True))
        if low is None or high is None:
            raise PropertyError(f"X_{number} has no {'lower' if low is None else 'upper'} bound")
        ends.append((low, high))
    if any(low.value > high.value or (low.value == high.value and (low.strict or high.strict)) for low, high in ends):
        return None
    lower, upper = (tuple(_float(pair[side].value) for pair in ends) for side in (0, 1))
    inner = (
        tuple(math.nextafter(end, away) if pair[side].strict else end for pair, end in zip(ends, outer, strict=True))
        for side, outer, away in ((0, lower, math.inf), (1, upper, -math.inf))
    )
    return (lower, upper, *inner)


def _rows(atoms: list[Row], columns: dict[str, range]) -> tuple[Tensor, Tensor]:
    """Linear constraints of a conjunction: rows and limits."""
    rows = torch.zeros(len(atoms), columns["X"].stop, dtype=torch.float64)
    for row, atom in enumerate(atoms):
        for (kind, number), value in atom.coefficients:
            rows[row, columns[kind][number]] = value
    return rows, _vector([atom.limit for atom in atoms])
