"""Any module's own forward as a graph: the same values, sound bounds, and clear refusals."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import Threat, check_below, check_intervals, classifier, lowest_margins, normal, random_points
from torch import Tensor, nn

from utils.attack.pgd import attack_radius, pgd
from utils.bounds.passes import METHODS, BoundPass
from utils.certify import certified_margin, certified_radius
from utils.graph.nodes import Linear
from utils.network.models import SequenceClassifier
from utils.network.symbolic import UnsupportedError, as_graph
from utils.network.trace import OPERATIONS, trace
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.question import margin_rows
from utils.runs.cli import ROOT

BATCH, FRAMES, SIZE, HIDDEN, CLASSES = 3, 4, 3, 4, 3
# Two ways to write a net have the same graph, so nearly the same radius. It is searched in float64: float32 would
# multiply what its weights' places in memory do to the last bits of a product, until only tol is left to compare by.
SAME_GRAPH = {"search_dtype": torch.float64}


def inputs(*shape: int, seed: int = 70) -> Tensor:
    return 0.5 * normal(*(shape or (BATCH, FRAMES, SIZE)), seed=seed)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and evaluation mode with random weights."""
    for number, parameter in enumerate(module.parameters()):
        scale = 0.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
        parameter.data = scale * normal(*parameter.shape, seed=1000 * seed + number)
    return module.double().eval().requires_grad_(False)


def check_sound(graph, x: Tensor, eps: float, methods=METHODS, threats=None, seed: int = 0) -> None:
    """Margins and intervals hold at random points, corners and where an attack leads."""
    rows = margin_rows(torch.arange(len(x)) % graph.output.size, graph.output.size).double()
    sizes = torch.full(x.shape[:2], eps).double()
    for threat in threats or (Threat(2.0), Threat(INF)):
        found = lowest_margins(graph, x, sizes, rows, threat, seed)
        for method in methods:
            bounds = BoundPass(graph, threat.around(x, sizes), method)
            margin = bounds.margin(rows)
            assert margin.isfinite().all()
            check_below(margin, found, f"{method} margin")
            check_intervals(bounds, random_points(x, sizes, threat, 6, seed + 1))


# --- torch's own recurrent layers -------------------------------------------------------------------------------------


class Stock(nn.Module):
    """A recurrent layer under a head that reads outputs, final states and the mean, from given initial states."""

    def __init__(self, kind, layers=1, bidirectional=False, batch_first=True, bias=True, state=False, **options):
        super().__init__()
        self.rnn = kind(
            SIZE, HIDDEN, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, **options
        )
        directions = 2 if bidirectional else 1
        self.head = nn.Linear((2 * directions + 1) * HIDDEN, CLASSES, bias=bias)
        self.state = nn.Parameter(torch.zeros(2, layers * directions, HIDDEN)) if state else None

    def forward(self, x):
        if not self.rnn.batch_first:
            x = x.permute(1, 0, 2)
        given = None
        if self.state is not None:
            batch = x.size(0 if self.rnn.batch_first else 1)
            h0, c0 = (part.unsqueeze(1).expand(-1, batch, -1).contiguous() for part in self.state)
            given = (h0, c0) if isinstance(self.rnn, nn.LSTM) else h0
        out, state = self.rnn(x, given)
        h_n = state[1] if isinstance(state, tuple) else state  # an LSTM's cell state, too, can be read
        if not self.rnn.batch_first:
            out = out.transpose(0, 1)
        return self.head(torch.cat((out[:, -1], out.mean(1), h_n[-1]), dim=-1))


KINDS = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_layers_in_every_setting(kind, batch_first, bidirectional, layers):
    options = {"nonlinearity": kind} if kind == "relu" else {}
    for bias, state in itertools.product((True, False), (False, True)):
        net = randomised(Stock(KINDS[kind], layers, bidirectional, batch_first, bias, state, **options), layers)
        x = inputs()
        graph = trace(net, x)
        torch.testing.assert_close(graph.evaluate(x), net(x), rtol=1e-12, atol=1e-12)
    check_sound(graph, x, 0.15, methods=("crown", "ibp") if layers < 3 else ("crown",), threats=(Threat(2.0),))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_a_sequence_classifier_read_as_a_module_has_the_same_margins_and_radii(kind, bidirectional, pooling):
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    rnn = KINDS[kind](SIZE, HIDDEN, 1 if bidirectional else 2, batch_first=True, bidirectional=bidirectional)
    head = nn.Linear(HIDDEN * (2 if bidirectional else 1), CLASSES)
    model = SequenceClassifier(rnn, head, pooling=pooling, mean=0.2, std=torch.tensor([0.5, 1.0, 2.0]))
    model, x = randomised(model), inputs()
    labels = model(x).argmax(dim=1)
    assert len(trace(Wrapped(model), x).nodes) <= len(unroll(model, FRAMES).nodes) + 2
    for method in METHODS:
        margins = [certified_margin(net, x, labels, 0.1, norm=1.0, method=method) for net in (model, Wrapped(model))]
        torch.testing.assert_close(*margins, rtol=1e-10, atol=1e-10)
    radii = [certified_radius(net, x[:2], labels[:2], norm=INF, **SAME_GRAPH) for net in (model, Wrapped(model))]
    assert (radii[0] > 0).all()
    torch.testing.assert_close(*radii, rtol=1e-6, atol=0)


# --- forwards written by hand -----------------------------------------------------------------------------------------


class Loop(nn.Module):
    """nn.LSTMCell and its like in a loop over time, from zeros made in the forward."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], HIDDEN)
        state = (h, torch.zeros_like(h)) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Gates(nn.Module):
    """An LSTM written out, with gates from one matrix for x and one for h."""

    def __init__(self):
        super().__init__()
        self.w_x, self.w_h = nn.Linear(SIZE, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = c = torch.zeros(len(x), HIDDEN, dtype=x.dtype)
        for frame in x.transpose(0, 1):
            i, f, g, o = (self.w_x(frame) + self.w_h(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + i.sigmoid() * torch.tanh(g)
            h = F.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class UpdateGate(nn.Module):
    """A minimal gated unit: one gate, one minus it, and a residual connection."""

    def __init__(self):
        super().__init__()
        self.gate, self.new = nn.Linear(SIZE + HIDDEN, HIDDEN), nn.Linear(SIZE + HIDDEN, HIDDEN)
        self.skip, self.head = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = torch.zeros(x.shape[0], HIDDEN, dtype=x.dtype)
        states = []
        for t in range(x.shape[1]):
            both = torch.cat([x[:, t], h], dim=1)
            z = torch.sigmoid(self.gate(both))
            h = (1 - z) * torch.tanh(self.new(both)) + z * h
            states.append(h + 0.5 * self.skip(x[:, t]))
        return self.head(torch.stack(states, dim=1).mean(dim=1))


class Highway(nn.Module):
    """x * sigmoid(y) with an affine x, minus signs, and what is not there at the batch's place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, HIDDEN), nn.Linear(SIZE, HIDDEN)
        self.head = nn.Linear(FRAMES * HIDDEN, CLASSES)

    def forward(self, x):
        y = self.a(x.reshape(-1, SIZE)).reshape(x.shape[0], x.shape[1], -1)
        gated = (2 * torch.tanh(y) - 1) * -torch.sigmoid(self.b(x)) + F.silu(y) - (3 - y) / 4
        return self.head(gated.flatten(1))


class Mixed(nn.Module):
    """Activations of every kind, views, constants and pooling."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Linear(SIZE, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 8), nn.Hardtanh()
        )
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.ReLU6())
        self.head = nn.Linear(12, CLASSES)
        self.register_buffer("offset", normal(6, seed=1))

    def forward(self, x):
        y = self.first(x)
        z = self.second(y + 0.1) + self.offset
        z += F.pad(x, (0, 3))
        z = torch.where(torch.tensor([True, False] * 3), z, z.flip(-1)).clamp(-1.0, 0.8)
        z = F.hardsigmoid(z) - torch.zeros_like(z)
        pooled = torch.cat((z.sum(dim=1) / z.shape[1], z[:, ::2].mean(1)), dim=-1)
        return F.log_softmax(self.head(pooled), dim=-1)


HAND = {
    "lstm cell": lambda: Loop(nn.LSTMCell(SIZE, HIDDEN)),
    "gru cell": lambda: Loop(nn.GRUCell(SIZE, HIDDEN)),
    "rnn cell": lambda: Loop(nn.RNNCell(SIZE, HIDDEN)),
    "relu cell": lambda: Loop(nn.RNNCell(SIZE, HIDDEN, nonlinearity="relu")),
    "gates": Gates,
    "update gate": UpdateGate,
    "highway": Highway,
    "mixed": Mixed,
}


@pytest.mark.parametrize("name", HAND)
def test_forwards_written_by_hand(name):
    net, x = randomised(HAND[name]()), inputs()
    graph, expected = trace(net, x), net(x)
    found = graph.evaluate(x)
    if name == "mixed":  # the softmax at the end is left out
        found = found.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    check_sound(graph, x, 0.15)
    labels = expected.argmax(dim=1)
    assert (certified_radius(net, x, labels, tol=0.02) > 0).all()


def test_loops_and_gates_by_hand_have_the_bounds_of_the_layer():
    """The same weights as nn.LSTM, nn.LSTMCell and written out: the same graph, so the same radius."""
    x = inputs()
    layer = randomised(nn.LSTM(SIZE, HIDDEN, batch_first=True))
    nets = [Stock(nn.LSTM), Loop(nn.LSTMCell(SIZE, HIDDEN)), Gates()]
    head = normal(CLASSES, HIDDEN, seed=5)
    zero = torch.zeros(CLASSES, 2 * HIDDEN).double()
    weights = [part.data for part in layer.parameters()]
    nets[0].rnn, nets[0].head.weight.data = layer, torch.cat((head, zero), dim=1)
    for target, value in zip(nets[1].cell.parameters(), weights, strict=True):
        target.data = value
    nets[2].w_x.weight.data, nets[2].w_h.weight.data = weights[:2]
    nets[2].w_x.bias.data = weights[2] + weights[3]
    for net in nets[1:]:
        net.head.weight.data = head
    for net in nets:
        net.double().head.bias.data = torch.zeros(CLASSES).double()
    labels = nets[0](x).argmax(dim=1)
    radii = [certified_radius(net, x, labels, **SAME_GRAPH) for net in nets]
    assert (radii[0] > 0).all()
    torch.testing.assert_close(radii[1], radii[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(radii[2], radii[0], rtol=1e-6, atol=0)


class WrittenGRU(Loop):
    """nn.GRUCell's equations; its last line in one of several forms, all of them the same."""

    form = staticmethod(lambda z, n, h: (1 - z) * n + z * h)

    def forward(self, x):
        h, cell = torch.zeros(len(x), HIDDEN, dtype=x.dtype), self.cell
        for t in range(x.shape[1]):
            own, past = F.linear(x[:, t], cell.weight_ih, cell.bias_ih), F.linear(h, cell.weight_hh, cell.bias_hh)
            (r_x, z_x, n_x), (r_h, z_h, n_h) = own.chunk(3, dim=1), past.chunk(3, dim=1)
            r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
            h = self.form(z, torch.tanh(n_x + r * n_h), h)
        return self.head(h)


FORMS = {
    "(1-z)n + zh": lambda z, n, h: (1 - z) * n + z * h,
    "n + z(h-n)": lambda z, n, h: n + z * (h - n),
    "(n-h)(1-z) + h": lambda z, n, h: (n - h) * (1 - z) + h,
    "(-n+h)z + n": lambda z, n, h: (-n + h) * z + n,
}


@pytest.mark.parametrize("form", FORMS)
def test_all_ways_to_write_an_update_gate_have_the_bounds_of_the_layer(form):
    stock, written = (randomised(kind(nn.GRUCell(SIZE, HIDDEN))) for kind in (Loop, WrittenGRU))
    written.form, x = FORMS[form], inputs()
    torch.testing.assert_close(trace(written, x).evaluate(x), stock(x), rtol=1e-12, atol=1e-12)
    labels = stock(x).argmax(dim=1)
    radii = [certified_radius(net, x, labels, tol=0.01, **SAME_GRAPH) for net in (stock, written)]
    torch.testing.assert_close(radii[1], radii[0], rtol=1e-6, atol=0)


def test_sums_that_only_look_like_an_update_gate():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(SIZE, HIDDEN) for _ in range(3))
            self.head = nn.Linear(6 * HIDDEN, CLASSES)

        def forward(self, x):
            a, b, z = (torch.tanh(self.a(x)), torch.relu(self.b(x)), torch.sigmoid(self.c(x)))
            sums = (
                a + z * (a - b),
                b + z * (b - a) * 2,
                a + 2 * (b - 2 * a) * z,
                a.flip(-1) + z * (b - a),
                a + z * (b + a),
            )
            return self.head(torch.cat((*sums, 3 * (b + z * (a - b)) - 1), dim=-1).mean(dim=1))

    net, x = randomised(Net()), inputs()
    torch.testing.assert_close(trace(net, x).evaluate(x), net(x), rtol=1e-12, atol=1e-12)
    check_sound(trace(net, x), x, 0.2)


# --- networks without time --------------------------------------------------------------------------------------------


def test_a_perceptron_and_a_small_convolutional_net():
    mlp = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES), nn.Softmax(dim=-1)
    )
    cnn = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2),
        nn.LeakyReLU(),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )
    cnn[1].running_mean, cnn[1].running_var = normal(3, seed=1), normal(3, seed=2).abs() + 0.5
    for net, x in ((mlp, inputs(BATCH, 6)), (cnn, inputs(BATCH, 1, 6, 6))):
        net = randomised(net)
        graph = trace(net, x)
        frames = x.flatten(1)[:, None]
        found = graph.evaluate(frames)
        torch.testing.assert_close(found.softmax(-1) if net is mlp else found, net(x), rtol=1e-12, atol=1e-12)
        check_sound(graph, frames, 0.1)
        labels = net(x).argmax(dim=1)
        by_module, by_graph = (certified_radius(either, x, labels, **SAME_GRAPH) for either in (net, graph))
        assert (by_module > 0).all()
        torch.testing.assert_close(by_module, by_graph, rtol=1e-6, atol=0)
        margin = certified_margin(net, x, labels, 0.5 * by_module)
        assert margin.shape == (BATCH, CLASSES - 1) and (margin > 0).all()


def test_batch_norm_is_folded_into_the_convolution():
    net = randomised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
    graph = trace(net, inputs(2, 1, 4, 4))
    assert [type(node).__name__ for node in graph.nodes] == ["Frame", "Convolution", "Activation", "Linear"]


def test_word_vectors_are_what_is_perturbed():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn = nn.Embedding(10, SIZE), nn.GRU(SIZE, HIDDEN, batch_first=True)
            self.position, self.head = nn.Embedding(FRAMES, SIZE), nn.Linear(HIDDEN, CLASSES)

        def forward(self, words):
            vectors = self.embedding(words) + self.position(torch.arange(words.shape[1]))
            return self.head(self.rnn(vectors)[1].squeeze(0))

    net, words = randomised(Words()), torch.tensor([[1, 2, 3, 4], [9, 0, 9, 0]])
    graph, vectors = trace(net, words), net.embedding(words)
    torch.testing.assert_close(graph.evaluate(vectors), net(words), rtol=1e-12, atol=1e-12)
    check_sound(graph, vectors, 0.1)
    labels = net(words).argmax(dim=1)
    radius = certified_radius(net, words, labels, frames=1, **SAME_GRAPH)
    by_vectors = certified_radius(graph, vectors, labels, frames=1, **SAME_GRAPH)
    torch.testing.assert_close(radius, by_vectors, rtol=1e-6, atol=0)
    assert (radius > certified_radius(net, words, labels)).all()


# --- what is promised on top ------------------------------------------------------------------------------------------


def test_margins_are_differentiable_in_the_weights_and_in_x():
    net, x = randomised(HAND["update gate"]()), inputs().requires_grad_()
    net.requires_grad_(True)
    margin = certified_margin(net, x, torch.zeros(BATCH, dtype=torch.int64), 0.05)
    gradients = torch.autograd.grad(margin.sum(), (x, *net.parameters()))
    assert all(bool(gradient.isfinite().all()) and bool((gradient != 0).any()) for gradient in gradients[:-1])
    before, step = margin.detach().sum(), 1e-5
    net.gate.weight.data[0, 0] += step
    after = certified_margin(net, x, torch.zeros(BATCH, dtype=torch.int64), 0.05).detach().sum()
    assert ((after - before) / step - gradients[1][0, 0]).abs() < 1e-3


def test_precision_and_relaxation_reach_the_graph():
    net, x = randomised(HAND["gates"]()).float(), inputs().float()
    labels = net(x).argmax(dim=1)
    assert certified_margin(net, x, labels, 0.1).dtype == torch.float32
    planes, lines = (certified_radius(net, x, labels, relaxation=kind, **SAME_GRAPH) for kind in ("plane", "line"))
    assert (planes > lines).all()
    graph = trace(net, x)
    by_graph = certified_radius(graph, x, labels, relaxation="line", **SAME_GRAPH)
    torch.testing.assert_close(by_graph, lines, rtol=1e-6, atol=0)
    assert as_graph(graph, torch.float32).evaluate(x).dtype == torch.float32


def test_one_sample_or_many_one_frame_or_many():
    net = randomised(Stock(nn.LSTM, 2, True))
    for batch, frames in itertools.product((1, 2, 5), (1, 2, 6)):
        x = inputs(batch, frames, SIZE)
        torch.testing.assert_close(trace(net, x).evaluate(x), net(x), rtol=1e-12, atol=1e-12)


def test_the_module_is_left_as_it_was():
    net, x = randomised(HAND["mixed"]()), inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net, x)
    certified_margin(net, x, torch.zeros(BATCH, dtype=torch.int64), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert type(net(x)) is Tensor and not net.training


def test_linear_layers_of_one_sum_become_one_node():
    graph = trace(randomised(Gates()), inputs())
    assert sum(isinstance(node, Linear) for node in graph.nodes) == FRAMES + 1


def test_attacks_take_the_same_networks():
    words = torch.tensor([[1, 2, 3, 4], [9, 0, 9, 0]])
    embedded = nn.Sequential(nn.Embedding(10, SIZE), nn.Flatten(), nn.Linear(SIZE * FRAMES, CLASSES))
    for net, x in (
        (HAND["gates"](), inputs(2, FRAMES, SIZE)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)), inputs(2, 1, 4, 4)),
        (embedded, words),
    ):
        net = randomised(net)
        labels = net(x).argmax(dim=1)
        certified, attacked = certified_radius(net, x, labels), attack_radius(net, x, labels, steps=20)
        assert (certified > 0).all() and (certified <= attacked.radius).all() and (attacked.margin < 0).all()
        assert (pgd(net, x, labels, 0.99 * certified, steps=10).margin > 0).all()
        with torch.no_grad():
            broken = attacked.x if x is words else attacked.x.reshape(x.shape)
            scores = net[1:](broken) if x is words else net(broken)
        assert (scores.argmax(dim=1) != labels).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A net whose forward is the given function of (net, x)."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.body, self.linear = forward, nn.Linear(SIZE, CLASSES)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.linear(self.body(self, x)[:, -1])


REFUSED = {
    "dropout is random in training mode": lambda net, x: F.dropout(x, 0.5, training=True),
    "lgamma: this operation is not supported": lambda net, x: x.lgamma(),
    "maximum has a bound of two tensors": lambda net, x: x.max(),
    "max_pool3d.*maximum has no bound": lambda net, x: F.max_pool3d(x[None], 1),
    "product of two tensors that both depend": lambda net, x: F.linear(x, x[0]),
    "division by constants": lambda net, x: torch.div(x, 2.0, rounding_mode="floor"),
    "its truth value is asked for": lambda net, x: x if x.sum() > 0 else -x,
    "samples of a batch are mixed": lambda net, x: x - x.mean(dim=0, keepdim=True),
    "samples of a batch are not treated alike|not in the order": lambda net, x: x.flip(0),
    "at the end of the network only": lambda net, x: x.log_softmax(dim=1),
    "changed in place through another view": lambda net, x: (F.relu(x[:, :1], inplace=True), x)[1],
    "relu: .*through another view": lambda net, x: (x.view(-1, SIZE).tanh_(), x.relu())[1],
    "sigmoid: .*through another view": lambda net, x: (x.detach().mul_(2), x.sigmoid())[1],
    "rounded to torch.float16": lambda net, x: x.half(),
    "it must not be random": lambda net, x: x + torch.rand(SIZE).double(),
    "a matrix of 3 columns does not fit 2 values": lambda net, x: F.linear(x[..., :2], torch.zeros(3, 3)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_bound_is_refused_in_one_line(message):
    parts = {"rnn": nn.RNN(SIZE, SIZE, batch_first=True)}
    net = randomised(Body(REFUSED[message], **parts))
    with pytest.raises(UnsupportedError, match=message) as caught:
        trace(net, inputs())
    assert "\n" not in str(caught.value)
    if "random" not in message or "training" in message:
        assert "test_trace.py, line" in str(caught.value) or "alike" in message


def test_a_refusal_quotes_the_line_of_the_forward():
    net = randomised(Body(lambda net, x: torch.cumprod(x, dim=1)))
    with pytest.raises(UnsupportedError, match=r"cumprod: .* \(test_trace.py, line \d+: .*torch\.cumprod\(x, dim=1\)"):
        trace(net, inputs())


def test_dropout_and_batch_norm_in_training_mode_are_refused():
    for part, x in ((nn.Dropout(0.5), inputs(2, 3)), (nn.BatchNorm1d(3), inputs(2, 3))):
        net = randomised(nn.Sequential(part, nn.Linear(3, 2)))
        trace(net, x)
        with pytest.raises(UnsupportedError, match=r"call model.eval\(\)"):
            trace(net.train(), x)
    net = randomised(Stock(nn.LSTM, 2, dropout=0.5))
    trace(net, inputs())
    with pytest.raises(UnsupportedError, match=r"call model.eval\(\)"):
        trace(net.train(), inputs())


def test_a_forward_with_another_result_is_refused():
    x = inputs()
    for body, message in (
        (lambda x: (x[:, 0], x), "scores of the classes alone"),
        (lambda x: x, "must be .batch, classes., not of shape .3, 4, 3."),
        (lambda x: torch.zeros(len(x), 2), "does not depend on the input"),
        (lambda x: 0 * x[:, 0] + torch.ones(SIZE), None),
    ):
        net = nn.Identity()
        net.forward = body
        if message is None:
            assert trace(net, x).output.size == SIZE
            continue
        with pytest.raises(UnsupportedError, match=message):
            trace(net, x)


def test_inputs_that_do_not_fit():
    net, x = randomised(Stock(nn.LSTM)), inputs()
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with pytest.raises(ValueError, match="finite"):
        certified_margin(net, x / 0, labels, 0.1)
    with pytest.raises(ValueError, match="input.size|Expected|expected"):
        certified_margin(net, x[..., :2], labels, 0.1)
    with pytest.raises(ValueError, match="lengths are for a SequenceClassifier"):
        certified_margin(net, x, labels, 0.1, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="the graph takes 4 frames of 3 values"):
        certified_margin(trace(net, x), x[:, :2], labels, 0.1)
    with pytest.raises(ValueError, match="eps must be"):
        certified_margin(net, x, labels, torch.ones(5))
    net.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="head.bias is not finite"):
        certified_margin(net, x, labels, 0.1)


def test_the_comparison_with_the_module_catches_a_wrong_reading(monkeypatch):
    """If an operation were read wrongly, tracing would fail instead of certifying another network."""
    monkeypatch.setitem(OPERATIONS, "tanh", lambda builder, x: builder.activation(x, "sigmoid"))
    with pytest.raises(UnsupportedError, match="something else than what was read"):
        trace(randomised(HAND["update gate"]()), inputs())


def test_models_of_the_old_kind_still_unroll():
    model, x = classifier(), inputs()
    margins = [certified_margin(net, x, torch.arange(BATCH), 0.1) for net in (model, unroll(model, FRAMES))]
    torch.testing.assert_close(*margins, rtol=1e-12, atol=1e-12)


def test_the_page_on_models_runs():
    """The Python blocks of docs/models.md, in order."""
    page = (ROOT / "docs" / "models.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    assert code.count("certified_radius(") >= 4
    exec(compile(code, "models.md", "exec"), {})
