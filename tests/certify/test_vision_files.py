"""Convolutional ONNX files: verdicts by scripts/verify.py, and what --dry-run says of their memory."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

from utils.attack.pgd import pgd
from utils.bounds import memory
from utils.bounds.memory import layer_table
from utils.bounds.neurons import windows
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius
from utils.certify.vnnlib import write_robustness
from utils.graph.convolution import Convolution
from utils.graph.nodes import Linear
from utils.network.trace import trace
from utils.peak import Peak
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.runs.cli import ROOT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from utils.network.onnx_graph import read_onnx  # noqa: E402

CLASSES, SHAPE = 4, (1, 8, 8)


def net_of(side: int = 8) -> nn.Sequential:
    """Two strided convolutions and two linear layers."""
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(6 * (side // 4) ** 2, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    for number, parameter in enumerate(net.parameters()):
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
        parameter.data = (scale * normal(*parameter.shape, seed=number)).float()
    return net.eval().requires_grad_(False)


def write_net(net: nn.Sequential, path) -> None:
    """The net as an ONNX file."""
    nodes, weights, name = [], [], "x"
    for number, layer in enumerate(net):
        given, more = [name], {}
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weights += [numpy_helper.from_array(p.numpy(), f"{n}{number}") for n, p in layer.named_parameters()]
            given += [f"weight{number}", f"bias{number}"]
        if isinstance(layer, nn.Conv2d):
            more = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
        if isinstance(layer, nn.Linear):
            more = {"transB": 1}
        kind = {nn.Conv2d: "Conv", nn.Linear: "Gemm", nn.ReLU: "Relu", nn.Flatten: "Flatten"}[type(layer)]
        nodes.append(helper.make_node(kind, given, [f"y{number}"], **more))
        name = f"y{number}"
    ends = (("x", (1, *SHAPE)), (name, (1, CLASSES)))
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)] for n, shape in ends)
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def question() -> tuple[nn.Sequential, Tensor, Tensor]:
    net, x = net_of(), (0.5 + 0.25 * normal(1, *SHAPE, seed=7)).clamp(0.0, 1.0).float()
    return net, x, net(x).argmax(dim=1)


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    """scripts/verify.py at an eps in this process: what it prints."""
    net, x, labels = question()
    write_net(net, tmp_path / "net.onnx")

    def call(eps: float, *flags: str) -> str:
        box = ((x - eps).clamp(min=0.0).double().flatten(), (x + eps).clamp(max=1.0).double().flatten())
        write_robustness(tmp_path / "p.vnnlib", *box, int(labels), CLASSES)
        given = ["--onnx", "net.onnx", "--vnnlib", "p.vnnlib", "--timeout", "20", "--threads", "1"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["verify.py", *given, *flags])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_a_file_has_the_bounds_of_its_module(tmp_path):
    net, x, labels = question()
    write_net(net, tmp_path / "net.onnx")
    graph = read_onnx(tmp_path / "net.onnx").graph
    for norm in (2.0, INF):
        for method in ("ibp", "crown"):
            of_file, of_module = (
                certified_margin(one, x.double(), labels, 0.02, norm=norm, method=method) for one in (graph, net)
            )
            torch.testing.assert_close(of_file, of_module, rtol=1e-6, atol=1e-6)


def check_verdict(verify, eps: float) -> str:
    """The verdict, which an attack must not contradict, and whose counter-example must be one."""
    net, x, labels = question()
    found = verify(eps)
    if found.startswith("unsat"):
        assert pgd(net, x, labels, eps, norm=INF, clip=(0.0, 1.0), steps=20, restarts=2).margin > 0
    if found.startswith("sat"):
        values = {name: float(value) for name, value in re.findall(r"\((\w+) ([^()]+)\)", found)}
        at = torch.tensor([values[f"X_{n}"] for n in range(x.numel())]).reshape(x.shape)
        assert bool(((at - x).abs() <= eps + 1e-6).all()) and int(net(at.float()).argmax()) != int(labels)
    return found.split()[0]


def test_verdicts(verify):
    """Proved below the certified radius; a counter-example far above."""
    net, x, labels = question()
    radius = float(certified_radius(net, x, labels, norm=INF, clip=(0.0, 1.0)))
    assert radius > 0.005 and check_verdict(verify, 0.9 * radius) == "unsat" and check_verdict(verify, 0.4) == "sat"


def test_a_wrong_verdict_is_caught(verify, monkeypatch):
    high = torch.full((1, 3), 1e3).double()
    monkeypatch.setattr("utils.certify.case_problem.BoundPass.margin", lambda self, rows: high)
    monkeypatch.setattr(
        "utils.certify.case_problem.CaseProblem.attack", lambda self, *args: torch.empty(0, self.case.lower.numel())
    )
    with pytest.raises(AssertionError):
        check_verdict(verify, 0.4)


def test_dry_run_lists_layers_and_their_memory(verify):
    lines = verify(0.01, "--dry-run").splitlines()
    table = [line for line in lines if line.endswith(" MiB")]
    assert [line.split(":")[0] for line in table] == [
        "Convolution 4x4x4",
        "Convolution 6x2x2",
        "Linear 12 values",
        f"Linear {CLASSES} values",
    ]
    assert "128 windows, in parts" in table[0] and "24 rows" in table[2] and "3 rows" in table[3]


def peak_of(bound) -> int:
    bound()  # what is kept is made
    with Peak() as peak:
        bound()
    return peak.most


def test_what_the_table_says_is_about_what_tensors_take(monkeypatch):
    """No more than a few times the peak of a pass, and hardly less; windows have a budget of their own."""
    side = 24
    net, x = net_of(side), (0.5 + 0.25 * normal(1, 1, side, side, seed=7)).double()
    graph = trace(net, x).detach()
    rows = margin_rows(net(x.float()).argmax(dim=1), CLASSES).double()
    around = Perturbation(x.flatten(1)[:, None], torch.full((1, 1), 0.05).double(), INF)
    for module in (windows, memory):
        monkeypatch.setattr(module, "BYTES", 2**17)
    stated = [float(line.split()[-2]) * 2**20 for line in layer_table(graph, rows.shape[1], torch.float64)]
    bounds = BoundPass(graph, around, "ibp", sound=False)
    _, image, linear, _ = (node for node in graph.nodes if isinstance(node, (Convolution, Linear)))
    of_rows = peak_of(lambda: bounds.bound_by_rows(linear))
    assert 0.2 * stated[2] < of_rows <= 1.1 * stated[2], (of_rows, stated)
    neurons = torch.arange(image.size)
    of_windows = peak_of(lambda: windows.WindowPass(bounds, image).bound(torch.zeros_like(neurons), neurons))
    assert 0.1 * stated[1] < of_windows <= 1.1 * stated[1], (of_windows, stated)
    assert peak_of(lambda: bounds.bound_by_rows(image)) > of_windows  # what windows spare
