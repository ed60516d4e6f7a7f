"""ONNX's own tests of nodes: what is read computes what they say, everything else is refused in one clear line.

Of each test of an operator that is known, one input of floats after the other is taken for the network's, the others
for constants, and each output for its result. Tests of operators written out in others (functions of the standard)
count for the operator. ``python -m pytest -s`` of this file prints how many are read and refused.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from utils.network.symbolic import UnsupportedError

onnx = pytest.importorskip("onnx")

from utils.network.onnx_graph import OPERATORS, read_onnx  # noqa: E402
from utils.network.onnx_operators import CONTROL  # noqa: E402

IR_VERSION = 8  # before 4, a constant must be an input as well
RTOL, ATOL = 1e-3, 1e-6  # ONNX's own runner has 1e-3 and 1e-7, of float32; some sums are of other orders here
PYTHON = ("Error", "argument", "'Symbol'", "invalid", "object")  # of words that say nothing to a user
# The other node tests of these are the same questions at other shapes, and slow.
FEWER = {"LayerNormalization": ("4d_axis1", "4d_axis_negative_1", "2d_axis0"), "RMSNormalization": ("4d_axis1", "2d")}


@functools.cache
def node_tests() -> list[tuple[str, object]]:
    """(operator, test) of all that ONNX has of the operators that are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, in the making of the tests
        from onnx.backend.test.case.node import collect_testcases

        cases = {case.name: case for case in collect_testcases()}
    found = []
    for name, case in cases.items():
        whole = cases.get(name.partition("_expanded")[0], case)
        kind = whole.model.graph.node[0].op_type
        if kind in {*OPERATORS, *CONTROL} and any(part in name for part in FEWER.get(kind, ("",))):
            found.append((kind, case))
    return found


def is_float(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float64) and value.size > 0


def questions(case):
    """(model, input, expected) of each input and output of floats; the model has no other input."""
    graph, (inputs, outputs) = case.model.graph, case.data_sets[0]
    if not all(isinstance(value, (np.ndarray, np.generic)) for value in inputs):
        return
    inputs = map(np.asarray, inputs)
    values = dict(zip((entry.name for entry in graph.input), inputs, strict=True))
    for entry in graph.input:
        for result, expected in zip(graph.output, outputs, strict=True):
            if not (is_float(values[entry.name]) and is_float(expected)):
                continue
            model = onnx.ModelProto()
            model.CopyFrom(case.model)
            model.ir_version = max(model.ir_version, IR_VERSION)
            del model.graph.input[:], model.graph.output[:]
            model.graph.input.append(entry)
            model.graph.output.append(result)
            others = (onnx.numpy_helper.from_array(value, name) for name, value in values.items() if name != entry.name)
            model.graph.initializer.extend(others)
            yield model, values[entry.name], expected


def verdict(path, model, given: np.ndarray, expected: np.ndarray) -> tuple[str, str]:
    """("read", ""), ("refused", why) or ("different", how); any other error is the test's."""
    onnx.save(model, str(path))
    try:
        network = read_onnx(path, shape=given.shape, check=False)
    except UnsupportedError as error:
        return "refused", str(error).removeprefix(f"{path}: ")
    found = network.outputs(torch.from_numpy(given).double().reshape(1, -1)).numpy().reshape(network.output_shape)
    if found.shape != expected.shape:
        return "different", f"of shape {found.shape}, not {expected.shape}"
    if not np.allclose(found, expected, rtol=RTOL, atol=ATOL, equal_nan=True):
        return "different", f"{found.flatten()[:3]}, not {expected.flatten()[:3]}"
    return "read", ""


def test_node_tests(tmp_path):
    counts, reasons = defaultdict(Counter), defaultdict(set)
    different, unclear = [], []
    for kind, case in node_tests():
        for model, given, expected in questions(case):
            result, words = verdict(tmp_path / "node.onnx", model, given, expected)
            counts[kind][result] += 1
            if result == "different":
                different.append(f"{case.name}, {model.graph.input[0].name}: {words}")
            if result == "refused":
                reasons[kind].add(words)
                if "\n" in words or len(words) > 300 or any(part in words for part in PYTHON):
                    unclear.append(f"{case.name}: {words}")
    for kind in sorted(counts):
        why = "".join(f"\n    {words}" for words in sorted(reasons[kind]))
        print(f"{kind}: {counts[kind]['read']} read, {counts[kind]['refused']} refused{why}")
    total = sum(counts.values(), Counter())
    print(f"{total['read']} read, {total['refused']} refused, {len(different)} different")
    assert not different and not unclear
    # All tests of these are of other kinds of numbers, or of sequences.
    assert set(OPERATORS) - set(counts) <= {"Shape", "Size", "CastLike", "Cast", "If"}
    assert all(own["read"] for own in counts.values()), [kind for kind, own in counts.items() if not own["read"]]
    assert total["read"] > 2 * total["refused"]


@pytest.mark.parametrize("kind", ["Tanh", "Flatten"])
def test_a_wrong_reading_is_found(kind, tmp_path, monkeypatch):
    """One operator gives the wrong numbers, one the wrong shape."""
    wrong = {
        "Tanh": lambda reader, x: reader.builder.activation(x, "sigmoid"),
        "Flatten": lambda reader, x, axis=1: x.view(lambda part: part.reshape(1, -1)),
    }
    monkeypatch.setitem(OPERATORS, kind, wrong[kind])
    cases = [case for operator, case in node_tests() if operator == kind]
    results = [verdict(tmp_path / "node.onnx", *question)[0] for case in cases for question in questions(case)]
    assert "different" in results
