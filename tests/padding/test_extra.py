"""Further arguments of a forward: exact, of each sample its own or shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_output_bounds import extremes
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from utils.attack import pgd
from utils.certify import band_radius, certified_margin, certified_radius, decide, output_bounds
from utils.graph import Graph
from utils.models import SequenceClassifier
from utils.network import UnsupportedError
from utils.network.constants.extra import Extra
from utils.network.trace import TracedModule, trace

BATCH, T, N, EPS, INF = 3, 4, 2, 0.1, float("inf")
LENGTHS = torch.tensor([4, 2, 3])


class Packs(nn.Module):
    """Sequences of their own lengths, and a second input that is exact."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.rnn, self.head, self.given = nn.GRU(N, 4, batch_first=True), nn.Linear(6, 2), nn.Linear(3, 2)
        for parameter in self.double().parameters():
            parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.requires_grad_(False).eval()

    def forward(self, x, lengths, about=None):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1][-1]
        about = torch.zeros(len(x), 3, dtype=x.dtype) if about is None else about
        return self.head(torch.cat((state, self.given(about).tanh().expand(len(x), -1)), dim=1))


class Fixed(nn.Module):
    def __init__(self, module, *arguments):
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x):
        return self.module(x, *(one.expand(len(x), *one.shape[1:]) for one in self.arguments))


def setup() -> tuple[Packs, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, T, N, generator=generator, dtype=torch.float64)
    return Packs(), x, torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)


def check_alone(net, x, bounds, arguments) -> None:
    """Each sample by a module that has its arguments inside, which is attacked as well."""
    for k in range(len(x)):
        fixed = Fixed(net, *(one[k : k + 1] for one in arguments))
        alone = output_bounds(fixed, x[k : k + 1], EPS, norm=INF)
        for side, own in zip(bounds, alone, strict=True):
            torch.testing.assert_close(side[k], own[0], rtol=1e-9, atol=1e-9)
        least, most = extremes(fixed, x[k : k + 1], EPS, INF)
        assert (least[0] >= bounds.lower[k] - 1e-9).all() and (most[0] <= bounds.upper[k] + 1e-9).all()


def test_arguments_by_place_and_by_name():
    net, x, about = setup()
    bounds = output_bounds(net, x, EPS, norm=INF, extra=(LENGTHS, about))
    check_alone(net, x, bounds, (LENGTHS, about))
    for same in ({"lengths": LENGTHS, "about": about}, (LENGTHS.tolist(), about.numpy())):
        named = output_bounds(net, x, EPS, norm=INF, extra=same)
        assert torch.equal(named.lower, bounds.lower) and torch.equal(named.upper, bounds.upper)
    shared = output_bounds(net, x, EPS, norm=INF, extra=(LENGTHS, about[:1]))
    check_alone(net, x, shared, (LENGTHS, about[:1].expand(BATCH, -1)))
    alone = output_bounds(net, x, EPS, norm=INF, extra=LENGTHS)
    check_alone(net, x, alone, (LENGTHS,))


def test_all_that_takes_a_module_takes_them():
    net, x, about = setup()
    extra = (np.asarray(LENGTHS), about)
    labels = net(x, LENGTHS, about).argmax(dim=1)
    radius = certified_radius(net, x, labels, tol=0.02, extra=extra)
    eps = 0.98 * radius
    assert (certified_margin(net, x, labels, eps, extra=extra) > 0).all()
    attacked = pgd(net, x, labels, eps, steps=8, extra=extra)
    assert (attacked.margin > 0).all()
    scores = net(attacked.x, LENGTHS, about)
    found = scores.gather(1, labels[:, None]) - scores.gather(1, 1 - labels[:, None])
    torch.testing.assert_close(found.squeeze(1), attacked.margin, rtol=1e-9, atol=1e-9)
    verdicts = [one.verdict for one in decide(net, x, labels, eps, extra=extra, time_limit=2.0)]
    assert verdicts == ["certified"] * BATCH
    broken = decide(net, x[:1], labels[:1], 30 * radius[:1], extra=(LENGTHS[:1], about[:1]), time_limit=2.0)
    assert broken[0].verdict == "falsified"
    values = net(x, LENGTHS, about)
    moved = band_radius(net, x, values - 0.1, values + 0.1, extra=extra, tol=0.05)
    assert (moved > 0).all()


def test_words_with_lengths_of_their_own():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.below = nn.Embedding(9, N).double(), Packs()

        def forward(self, words, lengths):
            return self.below(self.embedding(words), lengths) + (words == 1).sum(1, keepdim=True)

    net, words = Words().eval(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [1, 1, 2, 0]])
    bounds = output_bounds(net, words, EPS, norm=INF, extra=LENGTHS)
    vectors, counts = net.embedding(words).detach(), (words == 1).sum(1, keepdim=True)
    same = output_bounds(net.below, vectors, EPS, norm=INF, extra=LENGTHS)
    torch.testing.assert_close(bounds.lower, same.lower + counts, rtol=1e-9, atol=1e-7)


def test_lengths_of_another_sample_are_caught(monkeypatch):
    net, x, about = setup()
    monkeypatch.setattr(Extra, "key", lambda self, sample: ())
    with pytest.raises(UnsupportedError, match="computes something else"):
        output_bounds(net, x, EPS, norm=INF, extra=(LENGTHS, about))
    monkeypatch.setattr(TracedModule, "agrees", lambda self, *given: True)
    bounds = output_bounds(net, x, EPS, norm=INF, extra=(LENGTHS, about))
    with pytest.raises(AssertionError):
        check_alone(net, x, bounds, (LENGTHS, about))


def test_a_shared_matrix_that_looks_like_one_of_samples_is_not_misread():
    class Mixes(nn.Module):
        def forward(self, x, matrix):
            return (x @ matrix).sum(1)

    x, matrix = torch.rand(N, T, N), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    with pytest.raises((UnsupportedError, RuntimeError)):
        output_bounds(Mixes(), x, EPS, extra=matrix)  # as many rows as x: one a sample
    bounds = output_bounds(Mixes(), x[:1].expand(3, -1, -1), EPS, extra=matrix)
    assert (bounds.lower <= Mixes()(x[:1], matrix)).all()


def test_other_models_have_none():
    net, x, _ = setup()
    classifier = SequenceClassifier(nn.GRU(N, 4, batch_first=True), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="further arguments"):
        output_bounds(classifier, x, EPS, extra=LENGTHS)
    graph = trace(Fixed(net, LENGTHS[:1]), x[:1])
    assert isinstance(graph, Graph)
    with pytest.raises(ValueError, match="further arguments"):
        certified_margin(graph, x, torch.zeros(BATCH, dtype=torch.int64), EPS, extra=LENGTHS)
    with pytest.raises(UnsupportedError, match="missing"):
        output_bounds(net, x, EPS)
