"""scripts/certify.py: a model and data from files, with the rows that the Python interface has."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from mnist_files import ROOT
from own_files import LENGTHS, SHIFT, write_files
from test_bound_scripts import assert_one_line, call

from utils.certify import certified_margin, certified_radius
from utils.own.loading import load_array, load_model
from utils.runs.bound_rows import read_bound_rows

SCRIPT = ROOT / "scripts" / "certify.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("own"))


def rows_of(folder):
    return read_bound_rows(folder / "certified_bound.csv")


def test_rows_are_those_of_the_python_interface_and_resumed(place, tmp_path):
    folder, flags, model, x, labels = place
    flags = (*flags, "--data", folder / "x.npy", "--labels", folder / "y.csv", "--batch-size", 2, "--out-dir", tmp_path)
    done = call(SCRIPT, *flags)
    assert done.code == 0, done.err
    assert "1 misclassified, 4 to certify" in done.out
    rows = rows_of(tmp_path)
    right = torch.tensor([0, 1, 2, 4])
    expected = certified_radius(model, x[right], labels[right])
    assert [row.index for row in rows] == right.tolist() and [row.label for row in rows] == labels[right].tolist()
    torch.testing.assert_close(torch.tensor([row.radius for row in rows]).double(), expected, rtol=2e-3, atol=0.0)
    assert {"radius_histogram.png", "certified_fraction.png"} <= {path.name for path in tmp_path.iterdir()}
    record = json.loads((tmp_path / "run.json").read_text())
    lines = (tmp_path / "certified_bound.csv").read_text().splitlines(keepends=True)
    (tmp_path / "certified_bound.csv").write_text("".join(lines[:2]))
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    again = call(SCRIPT, *flags, "--resume")
    assert again.code == 0 and "resuming: 1 of 4 rows are there" in again.out, again.err
    assert [row.radius for row in rows_of(tmp_path)] == [row.radius for row in rows]


def test_one_eps_with_everything(place, tmp_path):
    folder, flags, model, x, labels = place
    np.save(tmp_path / "scales.npy", np.array([1.0, 0.5, 2.0]))
    flags = (*flags, "--data", f"{folder / 'both.npz'}:x", "--labels", f"{folder / 'both.npz'}:y", "--N", 3)
    how = ("--p", "inf", "--clip", -4, 4, "--frames", 0, 2, "--features", 0, 2, "--scales", tmp_path / "scales.npy")
    done = call(SCRIPT, *flags, *how, "--target", "runnerup", "--eps", 0.3, "--out-dir", tmp_path / "out")
    assert done.code == 0, done.err
    scores = model(x[:3]).detach()
    scores[torch.arange(3), labels[:3]] = -torch.inf
    threat = {"norm": "inf", "clip": (-4, 4), "frames": [0, 2], "features": [0, 2], "scales": [1.0, 0.5, 2.0]}
    targets = scores.argmax(dim=1)
    expected = certified_margin(model, x[:3], labels[:3], 0.3, targets=targets, dtype=torch.float64, **threat)
    for row, margin, target in zip(rows_of(tmp_path / "out"), expected[:, 0].tolist(), targets.tolist(), strict=True):
        assert row.target == target and abs(row.margin - margin) < 1e-6
        assert row.radius == (0.3 if margin > 0 else 0.0)


def test_one_score_without_labels_from_text(place, tmp_path):
    folder, flags, *_ = place
    flags = ("--model", f"{folder / 'my_model.py'}:one_score", "--data", folder / "flat.csv", "--shape", 4, 3)
    done = call(SCRIPT, *flags, "--N", 2, "--out-dir", tmp_path)
    assert done.code == 0, done.err
    model, x = load_model(f"{folder / 'my_model.py'}:one_score"), load_array(str(folder / "flat.csv"), "--data")
    x = x[:2].reshape(2, 4, 3).float()
    labels = (model(x)[:, 0] > 0.5).long()
    radius = certified_radius(model, x, labels)
    torch.testing.assert_close(
        torch.tensor([row.radius for row in rows_of(tmp_path)]).double(), radius, rtol=2e-3, atol=0.0
    )


def test_an_onnx_file(place, tmp_path):
    onnx = pytest.importorskip("onnx")
    folder, *_ = place
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], transB=1),
    ]
    tensors = {f"{kind[0]}{k}": getattr(model[k], kind).detach().numpy() for k in (0, 2) for kind in ("weight", "bias")}
    initial = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    ends = [helper.make_tensor_value_info(name, number, [1, size]) for name, size in (("x", 12), ("y", 3))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], initial)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(file, str(tmp_path / "net.onnx"))
    done = call(SCRIPT, "--model", tmp_path / "net.onnx", "--data", folder / "flat.csv", "--N", 1, "--dry-run")
    assert done.code == 0, done.err
    x = load_array(str(folder / "flat.csv"), "--data")[:1]
    radius = float(certified_radius(model.double(), x, model(x).argmax(dim=1)))
    found = float(done.out.partition("has radius ")[2].partition(",")[0])
    assert abs(found - radius) < 2e-3 * radius and done.out.endswith("nothing written\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "nothing.py:Net", "--data", "X"), "there is no file nothing.py"),
        (("--model", "MODEL:NUMBER", "--data", "X"), "cannot be called without arguments"),
        (("--model", "MODEL:Other", "--data", "X"), "has no Other"),
        (("--model", "my_model", "--data", "X"), "FILE.py:NAME"),
        (("--model", "MODEL:Net", "--data", "BOTH"), "holds x, y: say which"),
        (("--model", "MODEL:Net", "--data", "X", "--p", "0"), "give --clip"),
        (("--model", "MODEL:Net", "--data", "X", "--eps", "0.1", "--method", "bab"), "another than bab"),
        (("--model", "MODEL:Net", "--data", "X", "--save-certificate"), "certificates are of"),
        (("--model", "MODEL:Net", "--data", "X", "--shape", "5"), "--shape [5] does not fit"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, flags, words):
    folder = place[0]
    names = {"MODEL": folder / "my_model.py", "X": folder / "x.npy", "BOTH": folder / "both.npz"}
    flags = [str(names.get(flag, flag)).replace("MODEL:", f"{names['MODEL']}:") for flag in flags]
    assert_one_line(call(SCRIPT, *flags, "--out-dir", tmp_path / "out"), words)
    assert not (tmp_path / "out" / "certified_bound.csv").exists()


def padded(place):
    """The flags of a model with further arguments, the model, and these."""
    folder, flags, *_ = place
    name = f"{folder / 'my_model.py'}:Padded"
    extra = {"lengths": torch.tensor(LENGTHS), "shift": torch.tensor(SHIFT)}
    flags = ("--model", name, *flags[2:], "--data", folder / "x.npy", "--extra", folder / "more.npz")
    return flags, load_model(name, folder / "w.pt"), extra


@pytest.mark.parametrize("how", [(), ("--eps", 0.1), ("--N", 3)])
def test_further_arguments_of_the_forward(place, tmp_path, how):
    """Lengths, one an input, and an array of as many rows as three inputs, that is all inputs'."""
    x = place[3]
    flags, model, extra = padded(place)
    done = call(SCRIPT, *flags, *how, "--batch-size", 3, "--out-dir", tmp_path)
    assert done.code == 0, done.err
    count = 3 if "--N" in how else 5
    labels = model(x, **extra).argmax(dim=1)
    radius = torch.tensor([row.radius for row in rows_of(tmp_path)], dtype=torch.float64)
    if how[:1] == ("--eps",):
        margins = certified_margin(model, x, labels, 0.1, extra=extra, dtype=torch.float64).amin(dim=1)
        assert radius.tolist() == [0.1 if margin > 0 else 0.0 for margin in margins] and len(set(radius.tolist())) == 2
    else:
        expected = certified_radius(model, x, labels, extra=extra)[:count]
        torch.testing.assert_close(radius, expected, rtol=2e-3, atol=0.0)
    np.savez(tmp_path / "other.npz", lengths=np.array(LENGTHS[::-1]), shift=np.array(SHIFT))
    again = call(
        SCRIPT, *flags[:-1], tmp_path / "other.npz", *how, "--batch-size", 3, "--out-dir", tmp_path, "--resume"
    )
    assert_one_line(again, "--extra was")


def test_two_processes_find_what_one_does(place, tmp_path):
    """Each batch is one process's; the rows are merged in their order."""
    _, flags, *_ = place
    flags = (*flags, "--data", place[0] / "x.npy", "--p", "inf", "--batch-size", 2, "--threads", 1)
    assert call(SCRIPT, *flags, "--out-dir", tmp_path / "one").code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = [str(word) for word in (*torchrun, SCRIPT, *flags, "--out-dir", tmp_path / "two")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [(row.index, row.radius) for row in one] == [(row.index, row.radius) for row in two] and len(one) == 5
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
