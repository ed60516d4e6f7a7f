"""VNN-LIB: properties are read as they are meant, and no verdict is wrong."""

from __future__ import annotations

import csv
import itertools
import re
import runpy
import subprocess
import sys
import time

import pytest
import torch
from helpers import normal
from torch import nn

from utils.certify import certified_radius
from utils.certify.vnnlib import (
    Property,
    PropertyError,
    counter_example,
    decimal,
    parse_vnnlib,
    read_vnnlib,
    write_robustness,
)
from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import INF
from utils.runs.cli import ROOT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from utils.certify.verify import BoxSet, Verifier, inside_float32  # noqa: E402
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
    "(assert (< Y_0 1))": "use and, or, <= and >=",
    "(assert (= Y_0 1))": "use and, or, <= and >=",
    "(assert (<= Z_0 1))": "Z_0 is no number",
    "(assert (<= Y_2 1))": "Y_2 is not declared",
    "(assert (<= Y_0 nan))": "nan is no number",
    "(assert (<= (* Y_0 Y_1) 1))": "is not linear",
    "(assert (<= X_0 Y_0))": "inputs are supported in bounds",
    "(assert (<= (+ X_0 X_1) 1))": "inputs are supported in bounds",
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
    return Verifier(network, prop, time.monotonic() + seconds, **options).run()


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


def nets(tmp_path):
    """Small random recurrent classifiers as ONNX files."""
    for number, kind in enumerate((nn.RNN, nn.LSTM, nn.GRU)):
        torch.manual_seed(number)
        rnn, head = kind(2, 3, batch_first=True), nn.Linear(3, 3)
        model = SequenceClassifier(rnn, head).requires_grad_(False)
        for parameter in model.parameters():
            parameter *= 2.0
        yield read_onnx(export_onnx(model, 2, tmp_path / f"{kind.__name__}.onnx"))


@pytest.mark.parametrize("tuned_sides", [24, 0])  # boxes are split only, or bounded by tuned bounds before
def test_no_verdict_is_wrong(tmp_path, monkeypatch, tuned_sides):
    """Random properties: what is proved survives sampling, what is broken is broken in float64 and onnxruntime."""
    monkeypatch.setattr("utils.certify.verify.TUNED_SIDES", tuned_sides)
    counts = dict.fromkeys(("sat", "unsat", "unknown", "timeout"), 0)
    generator = torch.Generator().manual_seed(0)
    for network, number in itertools.product(nets(tmp_path), range(12)):
        center = normal(4, seed=number)
        lower, upper = center - 0.2 * (1 + number % 3), center + 0.2 * (1 + number % 3)
        points = lower + (upper - lower) * torch.rand(4000, 4, generator=generator, dtype=torch.float64)
        outputs = network.outputs(points)
        first, second = (outputs @ row for row in normal(2, 3, seed=100 + number))
        # Limits around what samples reach: sometimes just met, sometimes just missed.
        shift = (-0.02, -1e-4, 0.0, 1e-4, 0.02)[number % 5] * (1.0 + first.abs().max())
        rows = normal(2, 3, seed=100 + number)
        limits = torch.stack((first.min() + shift, second.quantile(0.5 + 0.1 * (number % 4))))
        text = "".join(f"(declare-const X_{k} Real)" for k in range(4)) + "".join(
            f"(declare-const Y_{k} Real)" for k in range(3)
        )
        for k in range(4):
            text += f"(assert (>= X_{k} {decimal(lower[k])}))(assert (<= X_{k} {decimal(upper[k])}))"
        atoms = [
            f"(<= (+ {' '.join(f'(* {decimal(c)} Y_{k})' for k, c in enumerate(row.tolist()))}) {decimal(limit)})"
            for row, limit in zip(rows, limits, strict=True)
        ]
        text += (
            f"(assert (and {atoms[0]} {atoms[1]}))"
            if number % 2
            else f"(assert (or {atoms[0]} (and {atoms[0]} {atoms[1]})))"
        )
        prop = parse_vnnlib(text)
        found = verdict(network, prop, seconds=1.0, seed=number)
        counts[found.result] += 1
        broken = [bool(prop.holds_for(x, y)) for x, y in zip(points[:500], outputs[:500], strict=True)]
        if found.result == "unsat":
            assert not any(broken)
            case = prop.cases[0]
            assert all((outputs @ r.T > b).any(dim=1).all() for r, b in case.conjunctions)
        if found.result == "sat":
            assert prop.holds_for(found.x, network.outputs(found.x[None])[0])
            assert prop.holds_for(found.x, network.runtime_outputs(found.x[None])[0], 1e-5)
            assert torch.equal(found.x.float().double(), found.x)
    assert counts["sat"] >= 10 and counts["unsat"] >= 10


def test_bounds_that_are_wrong_would_be_noticed(tmp_path, monkeypatch):
    """The property test has teeth: with bounds above the truth, something is proved that sampling refutes."""
    monkeypatch.setattr(
        "utils.certify.verify.BoundPass.margin", lambda self, rows: torch.full((1, rows.shape[1]), 1e3).double()
    )
    monkeypatch.setattr(
        "utils.certify.verify._CaseProblem.attack", lambda self, *args: torch.empty(0, self.case.lower.numel())
    )
    with pytest.raises(AssertionError):
        test_no_verdict_is_wrong(tmp_path, monkeypatch, 24)


def test_tuned_bounds_that_are_wrong_would_be_noticed(tmp_path, monkeypatch):
    """The same where only the tuned bounds are wrong."""
    monkeypatch.setattr(
        "utils.certify.verify.CurvedPass.margin", lambda self, rows: torch.full((1, rows.shape[1]), 1e3)
    )
    monkeypatch.setattr(
        "utils.certify.verify._CaseProblem.attack", lambda self, *args: torch.empty(0, self.case.lower.numel())
    )
    with pytest.raises(AssertionError):
        test_no_verdict_is_wrong(tmp_path, monkeypatch, 0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, "relu"])
def test_tuning_proves_more_of_wide_boxes(tmp_path, monkeypatch, kind):
    """At an eps between what planes and tuned bounds certify, with 40 inputs: too many to be split."""
    torch.manual_seed(0)
    rnn = nn.RNN(10, 24, nonlinearity="relu", batch_first=True) if kind == "relu" else kind(10, 24, batch_first=True)
    model = SequenceClassifier(rnn, nn.Linear(24, 4)).requires_grad_(False).double()
    model.rnn.weight_hh_l0 *= 2.0
    x = normal(1, 4, 10, seed=1)
    label = model(x).argmax(dim=1)
    tuned = "alpha" if kind == "relu" else "curve"
    planes, more = (certified_radius(model, x, label, norm=INF, method=method) for method in ("crown", tuned))
    assert more > 1.002 * planes
    eps = float(0.5 * (planes + more))
    network = read_onnx(export_onnx(model, 4, tmp_path / "net.onnx"))
    for sides, expected in ((24, "unsat"), (41, "unknown")):
        monkeypatch.setattr("utils.certify.verify.TUNED_SIDES", sides)
        write_robustness(tmp_path / "p.vnnlib", x.flatten() - eps, x.flatten() + eps, int(label), num_classes=4)
        found = verdict(network, read_vnnlib(tmp_path / "p.vnnlib"), split=False)
        assert found.result == expected
    assert verdict(network, read_vnnlib(tmp_path / "p.vnnlib"), seconds=0.0).result == "timeout"


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
    (tmp_path / "prop.vnnlib").write_text("(assert")
    (tmp_path / "instances.csv").write_text("net.onnx,prop.vnnlib,1\n")
    (tmp_path / "broken.csv").write_text("net.onnx,prop.vnnlib\n")
    for arguments, message in (
        (("--onnx", "net.onnx"), "give --onnx and --vnnlib"),
        (("--onnx", "net.onnx", "--vnnlib", "prop.vnnlib"), "is no valid ONNX file"),
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
