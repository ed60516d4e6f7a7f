"""VNN-LIB: properties are read as they are meant, and no verdict is wrong."""

from __future__ import annotations

import csv
import gzip
import itertools
import random
import re
import runpy
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from helpers import normal
from torch import nn

from utils.bounds import BoundPass, tune_slopes
from utils.certify import certified_radius
from utils.certify.vnnlib import (
    Case,
    Property,
    PropertyError,
    counter_example,
    decimal,
    parse_vnnlib,
    read_vnnlib,
    write_robustness,
)
from utils.clock import Pace, now
from utils.graph.graph import Graph
from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import INF
from utils.runs.cli import ROOT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from utils.certify import case_problem  # noqa: E402
from utils.certify.boxes import BoxSet, PartedPass  # noqa: E402
from utils.certify.case_problem import CaseProblem, inside_float32  # noqa: E402
from utils.certify.verify import Verifier  # noqa: E402
from utils.network.onnx_export import export_onnx  # noqa: E402
from utils.network.onnx_graph import OnnxNetwork, read_onnx  # noqa: E402

DECLARED = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1.0))(assert (>= X_1 0))(assert (<= X_1 5e-1))"


def parsed(text: str) -> Property:
    return parse_vnnlib(DECLARED + BOX + text)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_box_and_one_constraint():
    prop = parsed("; nothing else (matters)\n(assert (<= Y_0 Y_1))")
    (case,) = prop.cases
    assert (prop.num_inputs, prop.num_outputs) == (2, 2)
    assert case.lower.tolist() == [-1, 0] and case.upper.tolist() == [1, 0.5]
    ((rows, limits),) = case.conjunctions
    assert rows.tolist() == [[1, -1]] and limits.tolist() == [0] and prop.compares_outputs_only


def test_linear_constraints_on_either_side():
    prop = parsed("(assert (>= (+ (* 2 Y_0) (- Y_1) 3) (- 1.5 (* Y_1 -0.5))))")
    ((rows, limits),) = prop.cases[0].conjunctions
    assert rows.tolist() == [[-2, 1.5]] and limits.tolist() == [1.5] and not prop.compares_outputs_only


def test_disjunctions_of_outputs_share_a_box_and_those_of_inputs_have_their_own():
    prop = parsed("(assert (or (and (>= Y_0 1) (<= Y_1 2)) (>= Y_1 Y_0)))")
    assert [len(limits) for _, limits in prop.cases[0].conjunctions] == [2, 1]
    two = "(assert (or (and (<= X_0 0) (<= Y_0 1)) (and (>= X_0 0.5) (<= Y_1 1) (or (<= Y_0 0) (>= Y_0 3)))))"
    cases = parsed(two).cases
    assert [case.lower[0].item() for case in cases] == [-1, 0.5] and [case.upper[0].item() for case in cases] == [0, 1]
    assert [len(case.conjunctions) for case in cases] == [1, 2]


def test_empty_boxes_and_impossible_disjunctions_have_no_cases():
    assert parsed("(assert (>= X_0 2))(assert (<= Y_0 0))").cases == []
    assert parsed("(assert (or))(assert (<= Y_0 0))").cases == []
    assert len(parsed("(assert (>= X_0 1))(assert (<= Y_0 0))").cases) == 1  # a point


REFUSED = {
    "(assert (not (<= Y_0 1)))": "use and, or, <=, >=, <, > and =",
    "(assert (distinct Y_0 1))": "use and, or, <=, >=, <, > and =",
    "(assert (<= Z_0 1))": "Z_0 is no number",
    "(assert (<= Y_00 1))": "Y_00 is not declared",
    "(assert (>= (+ Y_00 Y_0) 1.5))": "Y_00 is not declared",
    "(assert (<= X_01 1))": "X_01 is not declared",
    "(assert (<= Y_\u0660 1))": "Y_\u0660 is not declared",
    "(declare-const Y_02 Real)": "Y_02 is no input X_i or output Y_j",
    "(declare-const Y_\u0662 Real)": "is no input X_i or output Y_j",
    "(assert (<= Y_0 1_5))": "1_5 is no number",
    "(assert (<= Y_0 0x10))": "0x10 is no number",
    "(assert (<= Y_0 \u0663))": "\u0663 is no number",
    "(assert (<= Y_0 infinity))": "infinity is no number",
    "(assert (<= Y_0 1.5.2))": "1.5.2 is no number",
    "(assert (<= Y_0 1e))": "1e is no number",
    "(assert (<= Y_0 --1))": "--1 is no number",
    "(assert (<= Y_0 1e999999999999))": "is too large or too small a number",
    "(assert (<= Y_0 1e-999999999999))": "is too large or too small a number",
    "(assert (<= (* 1e300 1e300 Y_0) 1))": "too large for float64",
    "(assert (<= (* 1e-300 1e-300 Y_0) -1e-320))": "too small for float64",
    '(assert (<= Y_0 "1"))': "is no number",
    "(assert (<= Y_0 |1))": "| is no number",
    "(assert (<= Y[0] 1))": "Y[0] is not declared",
    "(declare-network f (declare-input A real [1]) (declare-output B real [1]))": "a second network or input",
    "(assert (<= Y_2 1))": "Y_2 is not declared",
    "(assert (<= Y_0 nan))": "nan is no number",
    "(assert (<= (* Y_0 Y_1) 1))": "is not linear",
    "(assert (<= (* X_0 Y_1) 1))": "is not linear",
    "(declare-const X_2 Real)(assert (<= X_2 X_1))": "X_2 has no lower bound",
    "(assert (<= (+ (* 1e-300 X_0) Y_0) 1))": "too small for float64",
    "(assert (<= Y_0 1)": "parenthesis is not closed",
    "(assert (<= Y_0 1)))": "closes that was not opened",
    "(declare-const X_1 Real)": "declared twice",
    "(declare-const X_3 Real)": "without a gap",
    "(declare-const X_2 Real)(assert (<= X_2 1))": "X_2 has no lower bound",
    "(declare-const X_2 Int)": "is not understood",
    "(maximize Y_0)": "is not understood",
    "(assert (<= Y_0))": "use and, or",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_property_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "prop.vnnlib"
    path.write_text(DECLARED + BOX + text)
    with pytest.raises(PropertyError, match=re.escape(REFUSED[text])) as caught:
        read_vnnlib(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def random_formula(draw: random.Random, depth: int) -> str:
    """Nested and / or of all relations, with numbers of few bits: float64 computes with them exactly."""
    if depth and draw.random() < 0.7:
        parts = (random_formula(draw, depth - 1) for _ in range(draw.randint(1, 3)))
        return f"({draw.choice(('and', 'or'))} {' '.join(parts)})"
    number = lambda: str(draw.randint(-8, 8) / 4)  # noqa: E731
    relation = draw.choice(("<=", ">=", "<", ">", "=", "=="))
    if draw.random() < 0.2:
        sides = [f"(- (* {number()} X_1) Y_0)", draw.choice((f"(* X_0 {number()})", "(+ X_0 Y_1)", number()))]
    elif draw.random() < 0.4:
        sides = [draw.choice(("X_0", "(* 2 X_1)", "(- X_0)", "(+ X_1 0.5)")), number()]
    else:
        sides = [f"(+ (* {number()} Y_0) (- Y_1) (* Y_0 0.5))", draw.choice((number(), f"(* Y_1 {number()})"))]
    draw.shuffle(sides)
    return f"({relation} {' '.join(sides)})"


def meaning(expression, values: dict[str, Fraction]):
    """What a formula says, in exact arithmetic and by a second implementation."""
    if isinstance(expression, str):
        return values[expression] if expression in values else Fraction(expression)
    word, *parts = expression
    parts = [meaning(part, values) for part in parts]
    match word:
        case "and":
            return all(parts)
        case "or":
            return any(parts)
        case "+":
            return sum(parts)
        case "*":
            return parts[0] * parts[1]
        case "-":
            return -parts[0] if len(parts) == 1 else parts[0] - parts[1]
    left, right = parts
    return {"<=": left <= right, ">=": left >= right, "<": left < right, ">": left > right}.get(word, left == right)


def nested(text: str):
    """A formula as nested lists."""
    return eval(re.sub(r"[^()\s]+", r'"\g<0>",', text).replace("(", "[").replace(")", "],"))[0]


def test_formulas_mean_what_they_say():
    """Over a grid, on and beside all limits; what holds lies in the boxes that are bounded, too."""
    draw = random.Random(0)
    quarters = [k / 4 for k in range(-4, 5)]
    held = 0
    for _ in range(150):
        formula = random_formula(draw, 3)
        prop = parsed(f"(assert {formula})")
        assert prop.strict == bool(re.search(r"[<>] ", formula)) or not prop.cases
        for _ in range(60):
            x = [draw.choice(quarters), draw.choice(quarters[4:7])]
            y = [draw.choice(quarters) * 2, draw.choice(quarters) * 2]
            values = {f"{name}_{k}": Fraction(v) for name, own in (("X", x), ("Y", y)) for k, v in enumerate(own)}
            expected = meaning(nested(formula), values)
            point, outputs = (torch.tensor(own, dtype=torch.float64) for own in (x, y))
            assert prop.holds_for(point, outputs) == expected, (formula, values)
            if expected:
                held += 1
                closed = [((case.lower <= point) & (point <= case.upper)).all() for case in prop.cases]
                assert any(closed), formula
    assert 500 < held < 8000


def test_where_any_constraint_compares_inputs_all_rows_have_columns_for_them():
    first, second = parsed("(assert (or (<= (+ X_0 X_1) (* 2 Y_1)) (and (<= X_0 0) (<= Y_0 3))))").cases
    assert [(rows.tolist(), limits.tolist()) for rows, limits in first.conjunctions] == [([[0, -2, 1, 1]], [0])]
    assert [(rows.tolist(), limits.tolist()) for rows, limits in second.conjunctions] == [([[1, 0, 0, 0]], [3])]
    prop = parsed("(assert (< X_0 X_1))")
    assert prop.strict and not prop.compares_outputs_only
    y = torch.zeros(2, dtype=torch.float64)
    assert [prop.holds_for(torch.tensor([x, 0.25]).double(), y) for x in (0.0, 0.25, 0.5)] == [True, False, False]


def test_chains_and_differences():
    ((rows, limits),) = parsed("(assert (<= Y_0 Y_1 3))").cases[0].conjunctions
    assert rows.tolist() == [[1, -1], [0, 1]] and limits.tolist() == [0, 3]
    prop = parsed("(assert (!= Y_0 1))")
    zero = torch.zeros(2, dtype=torch.float64)
    assert [prop.holds_for(zero, torch.tensor([y, 0.0]).double()) for y in (0.5, 1.0, 1.5)] == [True, False, True]


def test_strict_sides_are_kept_out_of_counter_examples_but_in_the_proof():
    (case,) = parsed("(assert (< X_0 1))(assert (> X_1 0))(assert (< Y_0 0.1))").cases
    assert case.upper[0] == 1 and case.lower[1] == 0  # a proof is of the closed box
    assert case.inner_upper[0] == 1 - 2**-53 and case.inner_lower[1] == 5e-324
    ((_, limits),) = case.conjunctions
    assert limits[0] < 0.1 and torch.nextafter(limits[0], torch.tensor(1.0).double()) == 0.1
    assert parsed("(assert (< X_0 -1))").cases == [] and parsed("(assert (> X_0 1))").cases == []
    assert len(parsed("(assert (= X_0 1))").cases) == 1 and parsed("(assert (= X_0 1))(assert (< X_0 1))").cases == []
    # Two numbers with one nearest float64 are two numbers.
    assert parsed("(assert (<= X_0 0.1))(assert (>= X_0 0.10000000000000000001))").cases == []
    ((_, limits),) = parsed("(assert (<= (+ Y_0 0.1 0.2) 0.3))").cases[0].conjunctions
    assert limits.tolist() == [0.0]


def test_comments_ends_of_lines_marks_and_packing(tmp_path):
    odd = '; (a comment\n(set-info :source "a ) ; in a word")\n(set-info :x |( ;|)\n'
    text = f"{odd}{DECLARED}{BOX}(assert (<= Y_0 ; no\n Y_1))\n"
    plain = parse_vnnlib(text)
    for name, data in (
        ("crlf", text.replace("\n", "\r\n").encode()),
        ("mark", b"\xef\xbb\xbf" + text.encode()),
        ("gz", gzip.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(data)
        (case,) = read_vnnlib(tmp_path / name).cases
        assert torch.equal(case.lower, plain.cases[0].lower) and torch.equal(case.upper, plain.cases[0].upper)
        assert case.conjunctions[0][0].tolist() == [[1, -1]]
    (tmp_path / "gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(ValueError, match="gzip cannot unpack it"):
        read_vnnlib(tmp_path / "gz")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(PropertyError, match="utf-8"):
        read_vnnlib(tmp_path / "latin")


SECOND = """(vnnlib-version <2.0>)
(declare-network f (declare-input in float32 [1,2,2]) (declare-output out Real [2]))
(assert (and (<= -1 in[0,0,0]) (<= in[0,0,0] 1) (== in[0,0,1] 0.5) (< in [0, 1, 0] 2) (> in[0,1,0] 0)))
(assert (and (<= in[0,1,1] 4) (>= in[0,1,1] 3)))
(assert (or (<= out[0] out[1]) (>= out[1] 2.5)))
"""


def test_one_network_of_version_2():
    prop = parse_vnnlib(SECOND)
    assert (prop.num_inputs, prop.num_outputs, prop.input_shape, prop.strict) == (4, 2, (1, 2, 2), True)
    (case,) = prop.cases
    assert case.lower.tolist() == [-1, 0.5, 0, 3] and case.upper.tolist() == [1, 0.5, 2, 4]
    assert [(rows.tolist(), limits.tolist()) for rows, limits in case.conjunctions] == [
        ([[1, -1]], [0]),
        ([[0, -1]], [-2.5]),
    ]
    scalar = parse_vnnlib(SECOND.replace("Real [2]", "Real []").split("(assert (or")[0] + "(assert (<= out 1))")
    assert scalar.num_outputs == 1


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[1,2,2]", "[1,2,2]) (declare-input more real [1]", "one input and one output are supported"),
        ("(declare-output", "(declare-hidden h real [1]) (declare-output", "declare one input and one output"),
        ("float32", "int8", "the type must be real, float32 or float64"),
        ("out[0]", "out[2]", "out[2] is not declared"),
        ("out[0]", "out[00]", "out[00] is not declared"),
        ("out[0]", "out", "out is no number"),
        ("declare-output out", "declare-output 1", "1 is no name"),
        ("declare-output out", "declare-output in", "in is declared twice"),
        ("[1,2,2]", "[100000,100000]", "is too large"),
        ("(assert (or", "(declare-network g)(assert (or", "a second network"),
    ],
)
def test_what_else_version_2_has_is_named(old, new, message):
    with pytest.raises(PropertyError, match=re.escape(message)):
        parse_vnnlib(SECOND.replace(old, new, 1))


def test_too_many_cases_are_refused():
    either = "(assert (or (<= Y_0 0) (<= Y_1 0)))"
    with pytest.raises(PropertyError, match="more than"):
        parsed(either * 17)


def test_a_property_written_is_read_again(tmp_path):
    lower = torch.tensor([0.1, 1e-12, -1 / 3], dtype=torch.float64)
    upper = lower + torch.tensor([0.0, 1e-9, 2.0], dtype=torch.float64)
    for targets in (None, [0]):
        prop = read_vnnlib(write_robustness(tmp_path / "prop.vnnlib", lower, upper, 1, 3, targets))
        (case,) = prop.cases
        assert torch.equal(case.lower, lower) and torch.equal(case.upper, upper) and prop.compares_outputs_only
        rows = torch.cat([rows for rows, _ in case.conjunctions])
        assert rows.tolist() == [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]][: len(rows)] and len(rows) == (2, 1)[bool(targets)]
    assert "e" not in decimal(1e-300) and float(decimal(1e-300)) == 1e-300


def test_counter_examples_have_the_form_of_the_competition():
    text = counter_example(torch.tensor([0.5, 1e-9]), torch.tensor([2.0]))
    assert text == "((X_0 0.5)\n(X_1 9.999999717180685e-10)\n(Y_0 2.0))\n"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def linear_file(path, weight, bias, softmax=False):
    """Y = weight @ X + bias as an ONNX file."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["y"], ["p"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, weight.shape[1]))],
        [helper.make_tensor_value_info("p" if softmax else "y", TensorProto.FLOAT, (1, weight.shape[0]))],
        [numpy_helper.from_array(value.float().numpy(), name) for value, name in ((weight, "w"), (bias, "b"))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return read_onnx(path)


def verdict(network: OnnxNetwork, prop: Property, seconds: float = 20.0, **options):
    return Verifier(network, prop, now() + seconds, **options).run()


def test_a_linear_network_at_the_edge(tmp_path):
    """Y_0 = X_0 + X_1, Y_1 = X_0 - X_1 over the box: Y_0 reaches from -1 to 1.5."""
    network = linear_file(tmp_path / "net.onnx", torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.zeros(2))
    for text, expected in (
        ("(assert (>= Y_0 1.5))", "sat"),
        ("(assert (>= Y_0 1.500001))", "unsat"),
        ("(assert (<= Y_0 -1))", "sat"),
        ("(assert (<= Y_0 -1.000001))", "unsat"),
        ("(assert (>= Y_1 (+ Y_0 0.000001)))", "unsat"),
        ("(assert (>= Y_1 Y_0))", "sat"),
        ("(assert (>= Y_0 1.4))(assert (>= Y_1 0.6))", "unsat"),  # needs X_0 <= 1, X_1 <= 0.4 and X_1 >= 0.4
        ("(assert (>= Y_0 1.4))(assert (>= Y_1 0.5))", "sat"),
        ("(assert (or (>= Y_0 9) (<= Y_1 -9)))", "unsat"),
        ("(assert (or (>= Y_0 9) (<= Y_1 -1.2)))", "sat"),
        ("(assert (>= X_0 3))", "unsat"),  # an empty box
        ("", "sat"),  # no constraint at all
        ("(assert (or (and (<= X_0 0) (>= Y_0 0.6)) (and (>= X_0 0.5) (<= Y_0 0.4))))", "unsat"),
    ):
        found = verdict(network, parsed(text), seconds=2.0)
        if "0.6))" in text and "1.4" in text:  # a single point: nothing but sat would be wrong to be claimed
            assert found.result in ("sat", "unknown", "timeout")
            continue
        assert found.result == expected, text
        if expected == "sat":
            assert parsed(text).holds_for(found.x, network.graph.evaluate(found.x[None, None])[0])


@pytest.mark.parametrize("seed", range(3))
def test_inputs_and_outputs_of_a_relu_network_against_a_grid(tmp_path, seed):
    """A row of both, alone and where a second one says which half of the box counts; and one of inputs alone."""
    network = relu_file(tmp_path / "net.onnx", 2, 8, seed, outputs=2)
    x = torch.cartesian_prod(torch.linspace(-1, 1, 401), torch.linspace(0, 0.5, 201)).double()
    z = torch.cat((network.outputs(x), x), dim=1)
    row = normal(4, seed=seed)
    found, half = z @ row, x[:, 0] <= x[:, 1]
    factors = dict(zip(("Y_0", "Y_1", "X_0", "X_1"), row.tolist(), strict=True))
    for least, where in ((found.min(), ""), (found[half].min(), "(assert (<= X_0 X_1))")):
        room = 0.02 * (1.0 + found.abs().max())
        for limit, result in ((least + room, "sat"), (least - room, "unsat")):
            prop = parsed(f"{where}(assert {atom(factors, limit)})")
            answer = verdict(network, prop)
            assert answer.result == result
            assert result == "unsat" or prop.holds_for(answer.x, network.outputs(answer.x[None])[0])
    assert found[half].min() > found.min() + 1e-3 or seed  # the half is another question
    assert verdict(network, parsed("(assert (>= (+ X_0 X_1) 1.5001))")).result == "unsat"
    assert verdict(network, parsed("(assert (>= (+ X_0 X_1) 1.4999))")).result == "sat"


def nets(tmp_path):
    """Small random recurrent classifiers as ONNX files."""
    for number, kind in enumerate((nn.RNN, nn.LSTM, nn.GRU, "relu")):
        torch.manual_seed(number)
        relu = {"nonlinearity": "relu"} if kind == "relu" else {}
        kind = nn.RNN if relu else kind
        rnn, head = kind(2, 3, batch_first=True, **relu), nn.Linear(3, 3)
        model = SequenceClassifier(rnn, head).requires_grad_(False)
        for parameter in model.parameters():
            parameter *= 2.0
        yield read_onnx(export_onnx(model, 2, tmp_path / f"{number}.onnx"))


def atom(row: dict[str, float], limit: torch.Tensor) -> str:
    return f"(<= (+ {' '.join(f'(* {decimal(factor)} {name})' for name, factor in row.items())}) {decimal(limit)})"


OUTPUTS, INPUTS = [f"Y_{k}" for k in range(3)], [f"X_{k}" for k in range(4)]


def test_what_a_graph_beside_its_inputs_computes_and_bounds(tmp_path):
    """The frames in their order; a box of no width gives the value, one with a side that moves holds all of it."""
    outputs, inputs = normal(5, 3, seed=1), normal(5, 4, seed=2)
    for network in nets(tmp_path):
        graph, x = network.graph.beside_inputs(outputs, inputs), normal(6, 4, seed=3)
        expected = network.outputs(x) @ outputs.T + x @ inputs.T
        torch.testing.assert_close(graph.evaluate(network.frames(x)), expected, rtol=0, atol=1e-12)
        assert graph.recurrent == network.graph.recurrent and len(network.graph.nodes) == len(graph.nodes) - 1
        rows = torch.eye(5, dtype=torch.float64)[None]
        still = BoxSet(*(network.frames(x) for _ in range(2)))
        torch.testing.assert_close(BoundPass(graph, still).margin(rows), expected, rtol=0, atol=1e-9)
        lower, upper = x.clone(), x.clone()
        upper[:, 2] += 0.5
        least = BoundPass(graph, BoxSet(network.frames(lower), network.frames(upper))).margin(rows)
        for share in torch.linspace(0, 1, 101, dtype=torch.float64):
            at = lower + share * (upper - lower)
            assert bool((network.outputs(at) @ outputs.T + at @ inputs.T >= least).all())


@pytest.mark.parametrize("tuned_sides", [24, 0])  # boxes are split only, or bounded by tuned bounds before
@pytest.mark.parametrize("names", [OUTPUTS, OUTPUTS + INPUTS], ids=["outputs", "outputs beside inputs"])
def test_no_verdict_is_wrong(tmp_path, monkeypatch, names, tuned_sides):
    """Random properties: what is proved survives sampling, what is broken is broken in float64 and onnxruntime."""
    monkeypatch.setattr("utils.certify.verify.TUNED_SIDES", tuned_sides)
    counts = dict.fromkeys(("sat", "unsat", "unknown", "timeout"), 0)
    generator = torch.Generator().manual_seed(0)
    for network, number in itertools.product(nets(tmp_path), range(12)):
        center = normal(4, seed=number)
        lower, upper = center - 0.2 * (1 + number % 3), center + 0.2 * (1 + number % 3)
        points = lower + (upper - lower) * torch.rand(4000, 4, generator=generator, dtype=torch.float64)
        outputs = network.outputs(points)
        values = torch.cat((outputs, points), dim=1)[:, : len(names)]
        rows = normal(2, len(names), seed=100 + number)
        first, second = (values @ row for row in rows)
        # Limits around what samples reach: sometimes just met, sometimes just missed.
        # Of rows with inputs samples miss the corners, where these are least.
        wider = 1.0 if names == OUTPUTS else 10.0
        shift = (-0.02, -1e-4, 0.0, 1e-4, 0.02)[number % 5] * wider * (1.0 + first.abs().max())
        limits = torch.stack((first.min() + shift, second.quantile(0.5 + 0.1 * (number % 4))))
        text = "".join(f"(declare-const {name} Real)" for name in OUTPUTS + INPUTS)
        for k in range(4):
            text += f"(assert (>= X_{k} {decimal(lower[k])}))(assert (<= X_{k} {decimal(upper[k])}))"
        atoms = [
            atom(dict(zip(names, row.tolist(), strict=True)), limit) for row, limit in zip(rows, limits, strict=True)
        ]
        text += (
            f"(assert (and {atoms[0]} {atoms[1]}))"
            if number % 2
            else f"(assert (or {atoms[0]} (and {atoms[0]} {atoms[1]})))"
        )
        prop = parse_vnnlib(text)
        found = verdict(network, prop, seconds=3.0, seed=number)
        counts[found.result] += 1
        broken = [bool(prop.holds_for(x, y)) for x, y in zip(points[:500], outputs[:500], strict=True)]
        if found.result == "unsat":
            assert not any(broken)
            case = prop.cases[0]
            assert all((values @ r.T > b).any(dim=1).all() for r, b in case.conjunctions)
        if found.result == "sat":
            assert prop.holds_for(found.x, network.outputs(found.x[None])[0])
            assert prop.holds_for(found.x, network.runtime_outputs(found.x[None])[0], 1e-5)
            assert torch.equal(found.x.float().double(), found.x)
    assert counts["sat"] >= 10 and counts["unsat"] >= 10


def test_bounds_that_are_wrong_would_be_noticed(tmp_path, monkeypatch):
    """The property test has teeth: with bounds above the truth, something is proved that sampling refutes."""
    monkeypatch.setattr(
        "utils.certify.case_problem.BoundPass.margin", lambda self, rows: torch.full((1, rows.shape[1]), 1e3).double()
    )
    monkeypatch.setattr(
        "utils.certify.case_problem.CaseProblem.attack", lambda self, *args: torch.empty(0, self.case.lower.numel())
    )
    with pytest.raises(AssertionError):
        test_no_verdict_is_wrong(tmp_path, monkeypatch, OUTPUTS, 24)


def test_inputs_that_are_left_out_of_a_row_would_be_noticed(tmp_path, monkeypatch):
    stock = Graph.beside_inputs
    monkeypatch.setattr(Graph, "beside_inputs", lambda self, outputs, inputs: stock(self, outputs, 0.5 * inputs))
    with pytest.raises(AssertionError):
        test_no_verdict_is_wrong(tmp_path, monkeypatch, OUTPUTS + INPUTS, 24)


def test_tuned_bounds_that_are_wrong_would_be_noticed(tmp_path, monkeypatch):
    """The same where only the tuned bounds are wrong."""
    monkeypatch.setattr(
        "utils.certify.case_problem.CurvedPass.margin", lambda self, rows: torch.full((1, rows.shape[1]), 1e3)
    )
    monkeypatch.setattr(
        "utils.certify.case_problem.CaseProblem.attack", lambda self, *args: torch.empty(0, self.case.lower.numel())
    )
    with pytest.raises(AssertionError):
        test_no_verdict_is_wrong(tmp_path, monkeypatch, OUTPUTS, 0)


@pytest.mark.parametrize("kind", [nn.RNN, pytest.param(nn.LSTM, marks=pytest.mark.full), "relu"])
def test_tuning_proves_more_of_wide_boxes(tmp_path, monkeypatch, kind):
    """At an eps between what planes and tuned bounds certify, with 40 inputs: too many to be split."""
    torch.manual_seed(0)
    width = 8 if kind is nn.LSTM else 24
    options = {"nonlinearity": "relu"} if kind == "relu" else {}
    rnn = (nn.RNN if kind == "relu" else kind)(10, width, batch_first=True, **options)
    model = SequenceClassifier(rnn, nn.Linear(width, 4)).requires_grad_(False).double()
    model.rnn.weight_hh_l0 *= 2.0
    x = normal(1, 4, 10, seed=1)
    label = model(x).argmax(dim=1)
    tuned = "alpha" if kind == "relu" else "curve"
    effort = {"curve_steps": 8, "alpha_steps": 20 if kind == "relu" else 6}
    planes, more = (certified_radius(model, x, label, norm=INF, method=one, **effort) for one in ("crown", tuned))
    assert more > 1.002 * planes
    eps = float(0.5 * (planes + more))
    network = read_onnx(export_onnx(model, 4, tmp_path / "net.onnx"))
    for sides, expected in ((24, "unsat"), (41, "unknown")):
        monkeypatch.setattr("utils.certify.verify.TUNED_SIDES", sides)
        write_robustness(tmp_path / "p.vnnlib", x.flatten() - eps, x.flatten() + eps, int(label), num_classes=4)
        found = verdict(network, read_vnnlib(tmp_path / "p.vnnlib"), split=False)
        assert found.result == expected
    assert verdict(network, read_vnnlib(tmp_path / "p.vnnlib"), seconds=0.0).result == "timeout"


def relu_file(path, inputs: int, width: int, seed: int, outputs: int = 3) -> OnnxNetwork:
    """A relu network of two hidden layers as an ONNX file."""
    sizes, generator = (inputs, width, width, outputs), torch.Generator().manual_seed(seed)
    nodes, given, last = [], {}, "x"
    for k, (start, end) in enumerate(itertools.pairwise(sizes)):
        given |= {f"w{k}": torch.randn(end, start, generator=generator) * (2.0 / start) ** 0.5}
        given |= {f"b{k}": 0.1 * torch.randn(end, generator=generator)}
        nodes.append(helper.make_node("Gemm", [last, f"w{k}", f"b{k}"], [f"z{k}"], transB=1))
        last = f"z{k}"
        if k < 2:
            nodes.append(helper.make_node("Relu", [last], [f"h{k}"]))
            last = f"h{k}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, n)) for name, n in (("x", inputs), (last, sizes[-1]))
    ]
    tensors = [numpy_helper.from_array(value.numpy(), name) for name, value in given.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return read_onnx(path)


@pytest.mark.parametrize("seed", [2, 3])
def test_splitting_neurons_proves_what_one_bound_does_not(tmp_path, seed):
    network, x, eps = relu_file(tmp_path / "net.onnx", 30, 12, seed), normal(1, 30, seed=1), 0.12
    label = int(network.outputs(x).argmax())
    write_robustness(tmp_path / "p.vnnlib", x.flatten() - eps, x.flatten() + eps, label, num_classes=3)
    (case,) = read_vnnlib(tmp_path / "p.vnnlib").cases
    problem = CaseProblem(network, case, now() + 60.0)
    assert float(problem.bound(case.lower[None], case.upper[None])[0]) < 0
    assert problem.proved_by_splitting(case.lower[None], case.upper[None])


def rnn_file(path, inputs: int, width: int, steps: int, seed: int) -> OnnxNetwork:
    """A relu RNN with three outputs, whose first state is zero, as an ONNX file."""
    torch.manual_seed(seed)
    rnn = nn.RNN(inputs, width, nonlinearity="relu", batch_first=True)
    model = SequenceClassifier(rnn, nn.Linear(width, 3), pooling="mean").requires_grad_(False).double()
    model.rnn.weight_hh_l0 *= 2.0
    return read_onnx(export_onnx(model, steps, path))


@pytest.mark.parametrize("seed", [0, 1])
def test_splitting_neurons_of_a_recurrent_network_proves_more(tmp_path, monkeypatch, seed):
    """Where few neurons are open; where more are than ``FEW`` allows it is not tried."""
    network, x = rnn_file(tmp_path / "net.onnx", 6, 16, 4, seed), 0.3 * normal(1, 24, seed=1)
    label = int(network.outputs(x).argmax())

    def problem(eps: float) -> tuple:
        write_robustness(tmp_path / "p.vnnlib", x.flatten() - eps, x.flatten() + eps, label, num_classes=3)
        (case,) = read_vnnlib(tmp_path / "p.vnnlib").cases
        return CaseProblem(network, case, now() + 60.0), (case.lower[None], case.upper[None])

    low, high = 0.0, 4.0  # planes prove the first and not the second
    for _ in range(12):
        eps = 0.5 * (low + high)
        one, box = problem(eps)
        low, high = (eps, high) if float(one.bound(*box)[0]) > 0 else (low, eps)
    one, box = problem(1.04 * high)
    assert float(one.bound(*box)[0]) < 0
    monkeypatch.setattr("utils.certify.splitting.question.FEW", 0.0)
    assert not one.proved_by_splitting(*box)
    monkeypatch.setattr("utils.certify.splitting.question.FEW", 1.0)
    assert one.proved_by_splitting(*box)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_no_proof_by_split_neurons_is_wrong(tmp_path, monkeypatch, broken, recurrent):
    """Limits around what a grid reaches, alone and with another; bounds that are too high prove too much."""
    monkeypatch.setattr("utils.certify.splitting.question.FEW", 1.0)
    if broken:
        own = case_problem.split_rows
        monkeypatch.setattr("utils.certify.case_problem.split_rows", lambda *given: own(*given) + 0.05)
    wrong, proved = 0, 0
    for seed in range(2):
        path = tmp_path / "net.onnx"
        network = rnn_file(path, 1, 4, 3, seed) if recurrent else relu_file(path, 3, 5, seed)
        points = torch.cartesian_prod(*[torch.linspace(-0.5, 0.5, 21, dtype=torch.float64)] * 3)
        outputs = network.outputs(points)
        for shift in (-0.02, 0.005):
            limits = float(outputs[:, 0].min()) + shift, float(outputs[:, 1].median())
            text = "".join(f"(declare-const X_{k} Real)(declare-const Y_{k} Real)" for k in range(3))
            text += "".join(f"(assert (>= X_{k} -0.5))(assert (<= X_{k} 0.5))" for k in range(3))
            first, second = (f"(<= Y_{k} {decimal(limit)})" for k, limit in enumerate(limits))
            prop = parse_vnnlib(text + f"(assert (or (and {first} {second}) {first}))")
            (case,) = prop.cases
            done = CaseProblem(network, case, now() + 60.0).proved_by_splitting(case.lower[None], case.upper[None])
            proved += done
            wrong += done and any(prop.holds_for(x, y) for x, y in zip(points, outputs, strict=True))
    assert proved and (wrong > 0) == broken


def test_a_conjunction_without_constraints_is_never_disproved(tmp_path):
    network = relu_file(tmp_path / "net.onnx", 3, 5, 0)
    never = (torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([-1e3], dtype=torch.float64))
    anywhere = (torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    side = torch.full((3,), 0.5, dtype=torch.float64)
    for conjunctions, proved in (((never,), True), ((never, anywhere), False), ((anywhere, never), False)):
        case = Case(-side, side, list(conjunctions))
        problem = CaseProblem(network, case, now() + 60.0)
        assert problem.proved_by_splitting(case.lower[None], case.upper[None]) == proved


def absolute_file(path):
    """Y_0 = |X_0|, Y_1 = X_1 as an ONNX file."""
    given = {
        "w": [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]],
        "v": [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]],
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w"], ["a"], transB=1),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("Gemm", ["r", "v"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 2))],
        [numpy_helper.from_array(torch.tensor(value).numpy(), name) for name, value in given.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return read_onnx(path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(assert (= Y_0 0.25))", "sat"),
        ("(assert (= Y_0 -0.25))", "unsat"),
        ("(assert (= Y_0 0.1))(assert (= Y_1 0.3))", "sat"),
        ("(assert (= (+ Y_0 Y_1) 1.25))(assert (>= Y_0 0.9))", "sat"),
        ("(assert (= (+ Y_0 Y_1) 1.75))", "unsat"),
        ("(assert (= X_0 0.5))(assert (>= Y_0 0.6))", "unsat"),
        ("(assert (= X_0 0.5))(assert (>= Y_0 0.5))", "sat"),
        ("(assert (= X_0 -0.5))(assert (= Y_0 0.5))(assert (= Y_1 0))", "sat"),
        ("(assert (or (= Y_0 3) (= Y_0 1)))", "sat"),
        ("(assert (> Y_0 1.5))", "unsat"),
        ("(assert (> Y_0 0.999))", "sat"),
        ("(assert (> Y_0 1))", "no sat"),  # the closed constraint holds at the corners, the strict one nowhere
        ("(assert (>= Y_0 1))", "sat"),
        ("(assert (< Y_0 0))", "no sat"),
        ("(assert (<= Y_0 0))", "sat"),
        ("(assert (< X_0 1))(assert (> X_0 -1))(assert (>= Y_0 1))", "no sat"),
        ("(assert (> X_0 0.25))(assert (< X_0 0.75))(assert (> Y_0 0.7))(assert (< Y_0 0.75))", "sat"),
        ("(assert (> X_0 0.5))(assert (< X_0 0.5))", "unsat"),
        ("(assert (and (or (< Y_0 -1) (and (> Y_1 0.25) (or (= Y_0 2) (< Y_1 0.5))))))", "sat"),
    ],
)
def test_equalities_and_strict_comparisons(text, expected, tmp_path):
    """Sat is replayed in exact arithmetic; unsat is the truth on a grid that holds all the numbers above."""
    network = absolute_file(tmp_path / "net.onnx")
    prop = parsed(text)
    found = verdict(network, prop, seconds=3.0)
    assert found.result == expected or (expected == "no sat" and found.result in ("unknown", "timeout", "unsat"))
    assert ("read as <= and >=" in found.note) == prop.strict
    formulas = [nested(part) for part in re.findall(r"\(assert (.*?\))\)(?=\(assert|$)", BOX + text)]

    def holds(x, y):
        names = (*(f"X_{k}" for k in range(2)), *(f"Y_{k}" for k in range(2)))
        return all(meaning(formula, dict(zip(names, (*x, *y), strict=True))) for formula in formulas)

    if found.result == "sat":
        x = [Fraction(v) for v in found.x.tolist()]
        exact = [abs(x[0]), x[1]]
        assert [float(v) for v in exact] == network.outputs(found.x[None])[0].tolist()
        numbers = {Fraction(float(v)) for v in exact} | {Fraction(v) for v in exact}
        assert numbers  # Y is what float64 holds: 0.1 is its nearest float64, as the property's 0.1 is
        assert prop.holds_for(found.x, torch.tensor([float(v) for v in exact], dtype=torch.float64))
        assert (network.runtime_outputs(found.x[None])[0] - found.y).abs().max() < 1e-6
    else:
        grid = [Fraction(k, 20) for k in range(-20, 21)]
        assert not any(holds((a, b), (abs(a), b)) for a in grid for b in grid[20:31])


@pytest.mark.parametrize("seed", range(6))
def test_outputs_of_recurrent_networks_can_be_equal_to_numbers(seed, tmp_path):
    """Y_0 - Y_1 as at some input of the box: the counter-example has it to the last bit, in float64."""
    network = list(nets(tmp_path))[seed % 3]
    center = normal(4, seed=seed)
    y = network.outputs(center[None] + 0.05)[0]
    text = "".join(f"(declare-const X_{k} Real)" for k in range(4))
    text += "".join(f"(declare-const Y_{k} Real)" for k in range(3))
    for k in range(4):
        text += f"(assert (>= X_{k} {decimal(center[k] - 0.1)}))(assert (<= X_{k} {decimal(center[k] + 0.1)}))"
    limit = decimal(y[0] - y[1])
    prop = parse_vnnlib(text + f"(assert (= (- Y_0 Y_1) {limit}))(assert (<= Y_2 {decimal(y[2] + 0.5)}))")
    found = verdict(network, prop, seconds=10.0)
    assert found.result == "sat"
    (outputs,) = network.outputs(found.x[None])
    assert outputs[0] - outputs[1] == float(limit) and prop.holds_for(found.x, outputs)
    assert prop.holds_for(found.x, network.runtime_outputs(found.x[None])[0], 1e-5)
    far = parse_vnnlib(text + f"(assert (= (- Y_0 Y_1) {decimal(y[0] - y[1] + 100)}))")
    assert verdict(network, far, seconds=10.0).result == "unsat"


def test_a_second_spelling_changes_no_verdict(tmp_path):
    """Y_0 twice in a sum, 2 |X_0| >= 1.5, is sat; as Y_00 and Y_0 it was unsat, and is refused."""
    network = absolute_file(tmp_path / "net.onnx")
    found = verdict(network, parsed("(assert (>= (+ Y_0 Y_0) 1.5))"))
    assert found.result == "sat" and 2 * abs(found.x[0]) >= 1.5
    assert verdict(network, parsed("(assert (>= (+ Y_0 Y_0) 2.5))")).result == "unsat"
    with pytest.raises(PropertyError, match="Y_00 is not declared"):
        parsed("(assert (>= (+ Y_00 Y_0) 1.5))")


def test_a_shape_of_version_2_must_be_the_networks(tmp_path):
    network = absolute_file(tmp_path / "net.onnx")
    text = "(declare-network f (declare-input X real {}) (declare-output Y real [2]))"
    text += "(assert (<= 0 X{} 1))(assert (<= 0 X{} 1))"
    for shape, first, second in (("[2]", "[0]", "[1]"), ("[1,2]", "[0,0]", "[0,1]"), ("[2,1]", "[0,0]", "[1,0]")):
        prop = parse_vnnlib(text.format(shape, first, second) + "(assert (< Y[0] 0))")
        assert verdict(network, prop, seconds=1.0).result != "sat"
    wide = read_onnx(linear_path(tmp_path / "wide.onnx", (1, 2, 3)))
    cells = [f"X[{a},{b}]" for a in range(3) for b in range(2)]
    turned = "(declare-network f (declare-input X real [3,2]) (declare-output Y real [6]))"
    prop = parse_vnnlib(turned + "".join(f"(assert (<= 0 {cell} 1))" for cell in cells))
    with pytest.raises(ValueError, match=r"the network's input is \(1, 2, 3\), the property's \(3, 2\)"):
        verdict(wide, prop)


def linear_path(path, shape):
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


# --- time -------------------------------------------------------------------------------------------------------------


def wide_relu(path, width=300, layers=3):
    """Y_0 of an untrained net of 60 inputs: its bounds are loose, so that nothing is decided soon."""
    torch.manual_seed(0)
    sizes = [60, *[width] * layers, 2]
    nodes, given, name = [], [], "x"
    for k, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        given.append(numpy_helper.from_array((torch.randn(rows, columns) / rows**0.5).numpy(), f"w{k}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{k}"], [f"a{k}"]))
        name = f"a{k}"
        if k < layers:
            nodes.append(helper.make_node("Relu", [name], [f"r{k}"]))
            name = f"r{k}"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 60))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2))],
        given,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def wide_property() -> Property:
    text = "".join(f"(declare-const X_{k} Real)(assert (<= -1 X_{k} 1))" for k in range(60))
    return parse_vnnlib(text + "(declare-const Y_0 Real)(declare-const Y_1 Real)(assert (>= Y_0 40))")


@pytest.mark.parametrize("slow", ["attack", "tuning", "bound", "splitting"])
def test_the_time_limit_is_kept_whatever_takes_long(slow, tmp_path, monkeypatch):
    """Every evaluation, or every part of a bound, is made to take long: the end comes within 1 s of the limit."""
    network = read_onnx(wide_relu(tmp_path / "net.onnx"))
    prop, limit = wide_property(), 2.0

    def delayed(target: str, seconds: float) -> None:
        inner = eval(target, {"Graph": Graph, "BoxSet": BoxSet})

        def outer(*args, **kwargs):
            time.sleep(seconds)
            return inner(*args, **kwargs)

        owner, name = target.split(".")
        monkeypatch.setattr({"Graph": Graph, "BoxSet": BoxSet}[owner], name, outer)

    if slow == "attack":
        delayed("Graph.evaluate", 0.3)
    if slow == "bound":
        delayed("BoxSet.frame_deviation", 0.5)
    if slow == "tuning":
        monkeypatch.setattr("utils.certify.case_problem.TUNED_SHARE", 1.0)
        delayed("BoxSet.frame_deviation", 0.02)
    if slow == "splitting":
        monkeypatch.setattr("utils.certify.verify.TUNED_SIDES", 99)
    started = now()
    found = verdict(network, prop, seconds=limit)
    spent = now() - started
    assert found.result == "timeout" and spent < limit + 1.0


def test_tuned_slopes_end_in_time_with_the_best_that_was_met(tmp_path):
    network = read_onnx(wide_relu(tmp_path / "net.onnx", 60))
    boxes = BoxSet(*(network.frames(sign * torch.ones(1, 60, dtype=torch.float64)) for sign in (-1, 1)))
    rows = torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64)
    plain = BoundPass(network.graph, boxes).margin(rows)[0, 0]
    full, best = tune_slopes(network.graph, boxes, rows, 20)
    none, first = tune_slopes(network.graph, boxes, rows, 20, pace=Pace(now()))
    torch.testing.assert_close(first[0], plain)
    assert first.item() < best.item()
    torch.testing.assert_close(BoundPass(network.graph, boxes, slopes=none).margin(rows)[0, 0], plain)
    started = now()
    slopes, some = tune_slopes(network.graph, boxes, rows, 10**6, pace=Pace(started + 1.0))
    assert now() - started < 2.0 and some.item() > plain.item()
    torch.testing.assert_close(BoundPass(network.graph, boxes, slopes=slopes).margin(rows)[0], some)


def test_bounds_in_parts_are_the_bounds(tmp_path, monkeypatch):
    network = read_onnx(wide_relu(tmp_path / "net.onnx", 40))
    lower = network.frames(-torch.rand(3, 60, dtype=torch.float64))
    boxes, rows = BoxSet(lower, lower + 0.1), normal(1, 5, 2, seed=1)
    whole = BoundPass(network.graph, boxes).margin(rows)
    for work in (1.0, 1e5, 1e6):
        monkeypatch.setattr("utils.certify.boxes.PART_WORK", work)
        torch.testing.assert_close(PartedPass(network.graph, boxes).margin(rows), whole, rtol=1e-12, atol=1e-12)


def test_reading_counts_towards_the_time(tmp_path):
    with pytest.raises(TimeoutError):
        parse_vnnlib(DECLARED + BOX, deadline=now() - 1.0)
    with pytest.raises(TimeoutError):
        read_onnx(wide_relu(tmp_path / "net.onnx"), deadline=now() - 1.0)


def test_splitting_proves_more(tmp_path):
    """|X| as relu(X) + relu(-X) is at least 0, which one bound over [-1, 1] does not see but two halves do."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "c"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"], transB=1),
    ]
    values = {
        "w": [[1.0], [-1.0], [1.0]],
        "c": [0.0, 0.0, -0.5],
        "v": [[1.0, 1.0, -1.5], [0.0, 0.0, 1.0]],
        "b": [0.3, 0.0],
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 2))],
        [numpy_helper.from_array(torch.tensor(value).numpy(), name) for name, value in values.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    network = read_onnx(path)
    text = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
    prop = parse_vnnlib(text + "(assert (>= X_0 -1))(assert (<= X_0 1))(assert (<= Y_0 0.25))")
    assert verdict(network, prop, split=False).result == "unknown"
    found = verdict(network, prop)
    assert found.result == "unsat" and found.boxes > 1
    assert verdict(network, prop, seconds=0.0).result == "timeout"


def test_a_softmax_at_the_end_allows_comparisons_only(tmp_path):
    network = linear_file(
        tmp_path / "net.onnx", torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([0.0, -2.0]), True
    )
    assert verdict(network, parsed("(assert (<= Y_0 Y_1))")).result == "unsat"
    found = verdict(network, parsed("(assert (<= Y_1 Y_0))"))
    assert found.result == "sat" and abs(found.y.sum() - 1) < 1e-6
    assert verdict(network, parsed("(assert (< Y_0 Y_1))")).result == "unsat"
    assert verdict(network, parsed("(assert (> Y_0 Y_1))")).result == "sat"
    with pytest.raises(ValueError, match="may only compare outputs"):
        verdict(network, parsed("(assert (<= Y_0 0.9))"))


def test_a_property_of_another_size_is_refused(tmp_path):
    network = linear_file(tmp_path / "net.onnx", torch.ones(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="2 inputs and 3 outputs, the property 2 and 2"):
        verdict(network, parsed("(assert (<= Y_0 Y_1))"))


def test_points_stay_in_the_box_and_fit_float32():
    lower = torch.tensor([0.1, 1 / 3, -1.0, 0.0]).double() + torch.tensor([1e-12, 0, 0, 0]).double()
    upper = lower + torch.tensor([1e-3, 1e-12, 2.0, 0.0]).double()
    for share in (0.0, 0.5, 1.0):
        x = inside_float32(lower + share * (upper - lower), lower, upper)
        assert ((x >= lower) & (x <= upper)).all()
        assert torch.equal(x[[0, 2, 3]], x[[0, 2, 3]].float().double())
    boxes = BoxSet(lower[None, None], upper[None, None])
    ones = torch.ones(1, 1, 4, dtype=torch.float64)
    assert (boxes.center(0).sum() + boxes.frame_deviation(0, ones) >= upper.sum() - 1e-15).all()


# --- scripts ----------------------------------------------------------------------------------------------------------


def start(script: str, *arguments, cwd) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Scripts in this process, as their command line would run them in another folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_export_and_verify_from_another_folder(tmp_path, run):
    model = ROOT / "models" / "mnist_classifier" / "rnn_4_32_tanh"
    arguments = ("--model", model, "--N", 2, "--eps", 0.002, 0.3, "--out-dir", "vnn", "--threads", 1)
    done = start("export_model.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "onnxruntime's outputs are the classifier's" in done.stdout
    instances, results = tmp_path / "vnn" / "instances.csv", tmp_path / "vnn" / "results.csv"
    assert len(instances.read_text().splitlines()) == 4
    arguments = ("--instances", instances, "--results", results, "--threads", 1)
    assert "4 instances, 0 of them finished" in run("verify.py", *arguments, "--dry-run")[1]
    assert not results.exists()
    code, *_ = run("verify.py", *arguments)
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert code == 0 and [row["result"] for row in rows] == ["unsat", "sat", "unsat", "sat"]
    written = (tmp_path / "vnn" / "results_counterexamples" / "1.txt").read_text()
    assert written.startswith("sat\n((X_0 ") and written.count("(Y_") == 10 and written.endswith("))\n")

    # Interrupted in the middle of a row, and continued.
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:20])
    assert "exists: go on with it by --resume" in run("verify.py", *arguments)[2]
    code, out, _ = run("verify.py", *arguments, "--resume")
    assert code == 0 and "2 sat, 2 unsat" in out and len(out.splitlines()) == 3
    again = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["result"] for row in again] == [row["result"] for row in rows] and again[:2] == rows[:2]

    first = instances.read_text().splitlines()[1].split(",")
    single = ("--onnx", tmp_path / "vnn" / first[0], "--vnnlib", tmp_path / "vnn" / first[1], "--out", "r/out.txt")
    done = start("verify.py", *single, "--timeout", 20, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("sat\n((X_0")
    assert (tmp_path / "r" / "out.txt").read_text() == done.stdout


def test_bad_input_ends_in_one_line(tmp_path, run):
    (tmp_path / "net.onnx").write_text("nothing")
    (tmp_path / "prop.vnnlib").write_text(DECLARED + BOX)
    (tmp_path / "broken.vnnlib").write_text("(assert")
    (tmp_path / "instances.csv").write_text("net.onnx,prop.vnnlib,1\n")
    (tmp_path / "broken.csv").write_text("net.onnx,prop.vnnlib\n")
    for arguments, message in (
        (("--onnx", "net.onnx"), "give --onnx and --vnnlib"),
        (("--onnx", "net.onnx", "--vnnlib", "prop.vnnlib"), "is no valid ONNX file"),
        (("--onnx", "net.onnx", "--vnnlib", "broken.vnnlib"), "broken.vnnlib: a parenthesis is not closed"),
        (("--onnx", "missing.onnx", "--vnnlib", "prop.vnnlib"), "No such file"),
        (("--instances", "broken.csv", "--results", "results.csv"), "row 1 is not onnx,vnnlib,timeout"),
        (("--onnx", "net.onnx", "--vnnlib", "prop.vnnlib", "--timeout", "0"), "not a number above 0"),
    ):
        code, _, err = run("verify.py", *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    code, *_ = run("verify.py", "--instances", "instances.csv", "--results", "results.csv")
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert code == 2 and row["result"] == "error" and "no valid ONNX file" in row["message"]
    code, _, err = run("export_model.py", "--model", tmp_path, "--out-dir", "out")
    assert code == 2 and "0 checkpoints" in err and len(err.splitlines()) == 1


def test_a_row_that_fails_is_its_own_error(tmp_path, run, monkeypatch):
    """Whatever goes wrong in a row, the rows after it have their verdicts; the exit code is 2."""
    absolute_file(tmp_path / "net.onnx")
    (tmp_path / "prop.vnnlib").write_text(DECLARED + BOX + "(assert (>= Y_0 1.5))")
    (tmp_path / "bad.vnnlib").write_text(DECLARED + BOX + "(assert (>= Y_00 1.5))")
    (tmp_path / "net.txt").write_text("no network")
    rows = ["net.onnx,prop.vnnlib", "broken.onnx,prop.vnnlib", "net.onnx,bad.vnnlib", "net.txt,prop.vnnlib"]
    rows += ["none.onnx,prop.vnnlib", "net.onnx,prop.vnnlib"]
    (tmp_path / "list.csv").write_text("".join(f"{row},20\n" for row in rows))

    def read(path, **options):
        if path.name == "broken.onnx":
            raise RuntimeError("something that nobody\nhas thought of")
        return read_onnx(path, **options)

    monkeypatch.setattr("utils.network.onnx_graph.read_onnx", read)
    code, out, _ = run("verify.py", "--instances", "list.csv", "--results", "results.csv")
    found = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert code == 2 and [row["result"] for row in found] == ["unsat", *["error"] * 4, "unsat"]
    for row, words in zip(
        found[1:5], ("nobody has thought", "Y_00 is not", "no valid ONNX", "No such file"), strict=True
    ):
        assert words in row["message"]
    assert "4 error, 2 unsat" in out


def test_a_network_that_onnxruntime_cannot_run_has_a_verdict_and_a_word(tmp_path, run):
    """An LSTM over (batch, T, n) by layout=1."""
    given = {"w": normal(1, 8, 2, seed=1), "r": normal(1, 8, 2, seed=2)}
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", "w", "r"], ["all", "y"], hidden_size=2, layout=1)],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, "t", 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 2))],
        [numpy_helper.from_array(value.float().numpy(), name) for name, value in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "net.onnx"))
    text = "".join(f"(declare-const X_{k} Real)(assert (<= -1 X_{k} 1))" for k in range(6))
    text += "(declare-const Y_0 Real)(declare-const Y_1 Real)"
    (tmp_path / "unsat.vnnlib").write_text(text + "(assert (>= Y_0 1.001))")  # a state is between -1 and 1
    (tmp_path / "sat.vnnlib").write_text(text + "(assert (>= Y_0 Y_1))")
    for name in ("unsat", "sat"):
        files = ("--onnx", "net.onnx", "--vnnlib", f"{name}.vnnlib", "--timeout", 20)
        code, out, err = run("verify.py", *files)
        assert code == 0 and out.split()[0] == name and "note: onnxruntime cannot run it" in err
    assert run("verify.py", *files, "--input-shape", 1, 3, 2)[1].split()[0] == "sat"
    code, _, err = run("verify.py", *files, "--input-shape", 1, 4, 2)
    assert code == 2 and "the network has 8 inputs" in err
    code, _, err = run("verify.py", *files, "--input-shape", 1, 3, 3)
    assert code == 2 and "takes an input of shape (1, t, 2), not (1, 3, 3)" in err
    # The example is one that another implementation confirms, too.
    x = torch.tensor([float(v) for v in re.findall(r"X_\d+ ([^)]*)", out)]).reshape(1, 3, 2)
    (y,) = onnx.reference.ReferenceEvaluator(model).run(["y"], {"x": x.numpy()})
    assert y[0, 0, 0] >= y[0, 0, 1]


def test_sums_of_a_counter_example_are_exact():
    """Float64 would lose the small term; what only it gets wrong is no counter-example."""
    text = "(assert (<= (+ (* 3 X_0) X_1) 27021597764222976))"
    prop = parse_vnnlib(DECLARED + "(assert (= X_0 9007199254740992))(assert (= X_1 1))" + text)
    x, y = torch.tensor([2.0**53, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert not prop.holds_for(x, y) and 3 * x[0] + x[1] <= 27021597764222976
    at = parse_vnnlib(DECLARED + "(assert (= X_0 9007199254740992))(assert (= X_1 0))" + text)
    assert at.holds_for(x * torch.tensor([1.0, 0.0]), y)
    outputs = parsed("(assert (<= (+ Y_0 Y_1) 0))")
    zero = torch.zeros(2, dtype=torch.float64)
    assert outputs.holds_for(zero, torch.tensor([-1e30, 1e30], dtype=torch.float64))
    assert not outputs.holds_for(zero, torch.tensor([float("nan"), 0.0], dtype=torch.float64))
    assert outputs.holds_for(zero, torch.tensor([-float("inf"), 0.0], dtype=torch.float64))


def test_numbers_alone_are_decided_as_they_are_read():
    assert parsed("(assert (< X_0 X_0))").cases == [] and parsed("(assert (>= 0 1))").cases == []
    (case,) = parsed("(assert (<= X_0 X_0))(assert (<= 1 2))(assert (<= Y_0 1))").cases
    assert [len(limits) for _, limits in case.conjunctions] == [1]


def test_an_alternative_without_rows_beside_rows_of_inputs(tmp_path):
    network = linear_file(tmp_path / "net.onnx", torch.eye(2), torch.zeros(2))
    text = "(assert (or (<= X_0 0) (and (>= X_0 0.5) (<= X_0 X_1) (>= Y_0 5))))"
    assert verdict(network, parsed(text)).result == "sat"


@pytest.mark.parametrize("text", ["(<= (+ X_0 X_1) -5)", "(<= Y_0 -100)"])
def test_many_boxes_end_in_time(tmp_path, text):
    network = next(nets(tmp_path))
    names = [f"(declare-const {name} Real)" for name in OUTPUTS + INPUTS]
    box = "".join(f"(assert (>= X_{k} -1))(assert (<= X_{k} 1))" for k in range(4))
    parts = " ".join(f"(and (>= X_0 {k / 3000}) (<= X_0 {(k + 1) / 3000}) {text})" for k in range(3000))
    prop = parse_vnnlib("".join(names) + box + f"(assert (or {parts}))")
    started = now()
    assert verdict(network, prop, seconds=0.3).result in ("timeout", "unsat")
    assert now() - started < 2.0


def test_equalities_among_thousands_of_rows_are_found_at_once():
    rows = torch.randn(3000, 700, dtype=torch.float64)
    started = now()
    for last, expected in ((-rows[:1], [0]), (rows[:1], [])):
        case = Case(rows[0], rows[0], [(torch.cat((rows, last)), torch.zeros(3001, dtype=torch.float64))])
        assert case.with_equalities == expected
    assert now() - started < 5.0
