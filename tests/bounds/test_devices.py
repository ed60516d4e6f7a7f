"""Memory, and where tensors live, without a GPU: tensors without values, watched operations, simulated shortage."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from utils.bounds.memory import Parts, bytes_per_sample, is_out_of_memory, samples_at_once, waiting_columns
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius, margin_problem
from utils.choices import BALLS
from utils.graph.graph import Graph
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows

T, N, HIDDEN, CLASSES = 3, 5, 6, 4
CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
# What makes the host wait for a GPU, or copies from it.
SYNCHRONOUS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")


def make_model(kind: str, hidden: int = HIDDEN) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(CELLS[kind](N, hidden, batch_first=True), nn.Linear(hidden, CLASSES)).double()


def make_inputs(model: SequenceClassifier, batch: int = 4):
    x = torch.rand(batch, T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(dim=1)


class NoWaiting(TorchDispatchMode):
    """Fails at operations for which the host has to wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in SYNCHRONOUS and not by_mask, f"{name} makes the host wait"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("norm", (1.0, 2.0, float("inf")))
@pytest.mark.parametrize("method", ("crown", "crown-ibp"))
@torch.no_grad()
def test_the_host_waits_nowhere_in_a_bound(kind, norm, method):
    model = make_model(kind)
    x, labels = make_inputs(model)
    graph, rows = unroll(model, T), margin_rows(labels, CLASSES).to(x.dtype)
    perturbation = Perturbation(x, torch.full(x.shape[:2], 0.1).to(x.dtype), norm)
    reference = BoundPass(graph, perturbation, method).margin(rows)
    with NoWaiting():
        margin = BoundPass(graph, perturbation, method).margin(rows)
    torch.testing.assert_close(margin, reference, rtol=0, atol=0)
    with NoWaiting(), pytest.raises(AssertionError, match="wait"):
        x.sum().item()


@pytest.mark.parametrize("kind", CELLS)
@torch.no_grad()
def test_a_bound_stays_on_the_device_of_its_input(kind):
    """Meta tensors have no values, but operations on tensors of two devices fail."""
    model = make_model(kind).to("meta")

    def known(perturbation):
        perturbation._box, perturbation._exact, perturbation._ball = None, [False] * T, BALLS["frame"]

    x, eps = (torch.empty(*shape, dtype=torch.float64, device="meta") for shape in ((4, T, N), (4, T)))
    rows = torch.empty(4, CLASSES - 1, CLASSES, dtype=torch.float64, device="meta")
    with mock.patch.object(Perturbation, "__post_init__", known):
        for norm in (1.0, float("inf")):
            margin = BoundPass(unroll(model, T), Perturbation(x, eps, norm)).margin(rows)
            assert margin.device.type == "meta" and margin.shape == (4, CLASSES - 1)
        with pytest.raises(RuntimeError, match="device"):
            BoundPass(unroll(model, T), Perturbation(x, torch.zeros(4, T).double(), 1.0)).margin(rows)


def test_rows_and_lengths_move_to_the_device_of_the_input():
    """Labels, targets and frames may be on the CPU, wherever the input is."""
    model = make_model("rnn")
    x, labels = make_inputs(model)
    moved = []
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        moved.extend(arg for arg in args if isinstance(arg, torch.device))
        return original(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "to", to):
        margin_problem(model, x, labels, targets=(labels + 1) % CLASSES, lengths=torch.full((4,), T))
    assert moved.count(x.device) >= 4  # targets, rows, mask, lengths


@pytest.mark.parametrize("error", (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")))
def test_a_bound_without_enough_memory_is_made_in_halves(error):
    model = make_model("rnn")
    x, labels = make_inputs(model, 7)
    reference = certified_margin(model, x, labels, 0.05)
    radius = certified_radius(model, x, labels)
    pass_ = BoundPass.__init__
    sizes = []

    def limited(bounds, graph, perturbation, *args, **options):
        sizes.append(len(perturbation.x))
        if len(perturbation.x) > 2:
            raise error
        pass_(bounds, graph, perturbation, *args, **options)

    with mock.patch.object(BoundPass, "__init__", limited):
        torch.testing.assert_close(certified_margin(model, x, labels, 0.05), reference)
        assert sizes == [7, 4, 2, 2, 2, 1]
        torch.testing.assert_close(certified_radius(model, x, labels), radius, rtol=2e-3, atol=0)
    with mock.patch.object(BoundPass, "__init__", side_effect=error), pytest.raises(type(error)):
        certified_margin(model, x, labels, 0.05)
    with mock.patch.object(BoundPass, "__init__", side_effect=RuntimeError("other")), pytest.raises(RuntimeError):
        certified_margin(model, x, labels, 0.05)


def test_parts_keep_to_the_smaller_size():
    parts, seen = Parts(), []

    def double(values):
        seen.append(len(values))
        if len(values) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * values

    for _ in range(2):
        assert parts(double, 10, torch.arange(8)).tolist() == list(range(0, 16, 2))
    assert seen == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def peak_bytes(run) -> int:
    """Most memory that tensors made by ``run()`` take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("kind", CELLS)
@torch.no_grad()
def test_the_estimate_of_memory_is_above_the_peak_and_not_far(kind):
    model = make_model(kind, hidden=32)
    graph = unroll(model, 7)
    batch = 16
    x = torch.rand(batch, 7, N, dtype=torch.float64)
    perturbation = Perturbation(x, torch.full((batch, 7), 0.1, dtype=x.dtype), 1.0)
    rows = torch.eye(CLASSES, dtype=x.dtype)[None]
    peak = peak_bytes(lambda: BoundPass(graph, perturbation).margin(rows))
    estimate = batch * bytes_per_sample(graph, CLASSES, x.dtype)
    assert peak <= estimate <= 6 * peak, (peak, estimate)


def test_samples_that_fit_follow_the_free_memory():
    graph = unroll(make_model("lstm"), T)
    assert isinstance(graph, Graph) and waiting_columns(graph, len(graph.nodes) - 1) >= N * T
    each = bytes_per_sample(graph, 3, torch.float64)
    assert each > 1.9 * bytes_per_sample(graph, 3, torch.float32)
    for free, expected in ((100 * each, 60), (1, 1), (None, None)):
        with mock.patch("utils.bounds.memory.free_bytes", return_value=free):
            assert samples_at_once(graph, 3, torch.float64, torch.device("cuda")) == expected
