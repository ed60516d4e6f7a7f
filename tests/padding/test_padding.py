"""Padded sentences: masks, lengths and packing are constants of each sample; pads never count."""

from __future__ import annotations

import pytest
import torch
from test_output_bounds import extremes
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from utils.attack import pgd
from utils.certify import Substitutes, certified_margin, certified_radius, output_bounds
from utils.network import UnsupportedError
from utils.network.constants import groups
from utils.network.operations import sequences
from utils.network.trace import TracedModule, trace

SIZE, HIDDEN, EPS, INF = 3, 4, 0.1, float("inf")
WORDS = torch.tensor([[3, 4, 5, 0], [1, 2, 0, 0], [6, 7, 8, 9], [5, 5, 1, 0]])


class Net(nn.Module):
    """Vectors of words, a recurrent layer and a head; what lies between is ``between(net, words, vectors)``."""

    def __init__(self, between, kind=nn.GRU, width=HIDDEN, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(12, SIZE, padding_idx=0)
        self.rnn = kind(SIZE, HIDDEN, batch_first=True, **options) if kind is not None else None
        self.score, self.head, self.between = nn.Linear(SIZE, 1), nn.Linear(width, 2), between
        self.given = None
        for parameter in self.double().parameters():
            parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.requires_grad_(False).eval()

    def forward(self, words):
        vectors = self.embedding(words) if self.given is None else self.given
        return self.head(self.between(self, words, vectors))


def mean(net, words, vectors):
    mask = (words != 0).unsqueeze(-1)
    return (net.rnn(vectors)[0] * mask).sum(1) / mask.sum(1)


def last(net, words, vectors):
    lengths = (words != 0).sum(1)
    return net.rnn(vectors)[0][torch.arange(len(words)), lengths - 1]


def gathered(net, words, vectors):
    places = (words.ne(0).cumsum(1).argmax(1)).view(-1, 1, 1).expand(-1, 1, HIDDEN)
    return net.rnn(vectors)[0].gather(1, places).squeeze(1)


def packed_last(net, words, vectors, ordered=False):
    lengths = (words != 0).sum(1).cpu()
    state = net.rnn(pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=ordered))[1]
    state = state[0] if isinstance(state, tuple) else state
    return state[-1] if not net.rnn.bidirectional else torch.cat((state[-2], state[-1]), dim=1)


def packed_mean(net, words, vectors):
    lengths = (words != 0).sum(1)
    outputs, _ = net.rnn(pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False))
    outputs, lengths = pad_packed_sequence(outputs, batch_first=True, total_length=words.shape[1])
    return outputs.sum(1) / lengths.unsqueeze(1)


def steps_first(net, words, vectors):
    vectors, lengths = vectors.transpose(0, 1), words.bool().sum(1)
    return net.rnn(pack_padded_sequence(vectors.transpose(0, 1), lengths, True, enforce_sorted=False))[1][-1]


def masked_scores(hidden):
    def between(net, words, vectors):
        scores = net.score(vectors.tanh()).squeeze(-1)
        share = (scores + (words == 0) * hidden if hidden > -10 else scores.masked_fill(words == 0, hidden)).softmax(1)
        return torch.bmm(share.unsqueeze(1), vectors).squeeze(1)

    return between


def greatest(net, words, vectors):
    return vectors.tanh().masked_fill((words == 0).unsqueeze(-1), -torch.inf).max(dim=1).values


def chosen(net, words, vectors):
    mask = (words > 0).unsqueeze(-1).expand_as(vectors)
    return torch.where(mask, vectors.sigmoid(), torch.zeros_like(vectors)).sum(1)


def state_kept(net, words, vectors):
    """A loop of the usual kind: frames of padding leave the state as it was."""
    state = vectors.new_zeros(len(words), HIDDEN)
    for t in range(words.shape[1]):
        weights = (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0, net.rnn.bias_ih_l0, net.rnn.bias_hh_l0)
        new = torch.gru_cell(vectors[:, t], state, *weights)
        count = (words[:, t] != 0).to(new.dtype).unsqueeze(-1)
        state = count * new + (1 - count) * state
    return state


def written(net, words, vectors):
    """States of all steps, in a tensor that was there before, of which pads are taken off."""
    states = torch.zeros(len(words), words.shape[1], HIDDEN, dtype=vectors.dtype)
    outputs = net.rnn(vectors)[0]
    for t in range(words.shape[1]):
        states[:, t] = outputs[:, t]
    return (states * (words != 0)[..., None]).sum(1)


READ = {
    "masked mean": (mean, {}),
    "last state by index": (last, {}),
    "last state gathered": (gathered, {}),
    "packed GRU": (packed_last, {}),
    "packed LSTM, two layers, both ways": (
        packed_last,
        {"kind": nn.LSTM, "num_layers": 2, "bidirectional": True, "width": 2 * HIDDEN},
    ),
    "packed LSTM with a projection": (packed_last, {"kind": nn.LSTM, "proj_size": 2, "width": 2}),
    "packed RNN, padded again": (packed_mean, {"kind": nn.RNN}),
    "packed GRU both ways, padded again": (packed_mean, {"bidirectional": True, "width": 2 * HIDDEN}),
    "steps first": (steps_first, {}),
    "scores of minus infinity": (masked_scores(-torch.inf), {"kind": None, "width": SIZE}),
    "scores of the least float": (masked_scores(torch.finfo(torch.float32).min), {"kind": None, "width": SIZE}),
    "masked maximum": (greatest, {"kind": None, "width": SIZE}),
    "where": (chosen, {"kind": None, "width": SIZE}),
    "state kept by a mask": (state_kept, {}),
    "written into a tensor": (written, {}),
}


def made(name: str) -> Net:
    between, options = READ[name]
    return Net(between, **options)


def of_vectors(net: Net, sentence: torch.Tensor):
    """The module itself, at any vectors (N, T, n) of one sentence."""

    def function(vectors):
        net.given = vectors
        try:
            return net(sentence.expand(len(vectors), -1))
        finally:
            net.given = None

    return function


def check_inside(net: Net, words: torch.Tensor, bounds) -> None:
    """Samples and attacks of the module itself stay inside of its bounds."""
    for sentence, lower, upper in zip(words, bounds.lower, bounds.upper, strict=True):
        least, most = extremes(of_vectors(net, sentence), net.embedding(sentence[None]), EPS, INF)
        assert (least[0] >= lower - 1e-9).all() and (most[0] <= upper + 1e-9).all()


def cut_bounds(net: Net, words: torch.Tensor) -> list:
    """Bounds of each sentence alone, without its pads: there is nothing to mask then."""
    found = []
    for sentence in words:
        cut = sentence[None, : int((sentence != 0).sum())]
        found.append(output_bounds(net, cut, EPS, norm=INF))
    return found


def check_like_cut(net: Net, words: torch.Tensor, bounds) -> None:
    for number, alone in enumerate(cut_bounds(net, words)):
        for side, own in zip(bounds, alone, strict=True):
            torch.testing.assert_close(side[number], own[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", READ)
def test_bounds_hold_for_the_module_and_are_those_without_pads(name):
    net, words = made(name), WORDS[:3]
    bounds = output_bounds(net, words, EPS, norm=INF)
    check_inside(net, words, bounds)
    check_like_cut(net, words, bounds)


def test_scores_lowered_by_a_large_number():
    net = Net(masked_scores(-5.0), kind=None, width=SIZE)  # which does leave pads a small share
    check_inside(net, WORDS, output_bounds(net, WORDS, EPS, norm=INF))


def test_sorted_packing_takes_batches_in_its_order():
    net = Net(lambda *given: packed_last(*given, ordered=True))
    order = WORDS.bool().sum(1).argsort(descending=True)
    bounds = output_bounds(net, WORDS[order], EPS, norm=INF)
    check_like_cut(net, WORDS[order], bounds)
    with pytest.raises(RuntimeError, match="sorted"):
        output_bounds(net, WORDS, EPS, norm=INF)


# --- what is asked of a batch is asked of each sample -----------------------------------------------------------------


def test_margins_radii_and_attacks_are_those_of_the_samples_alone():
    net = made("packed GRU")
    labels = net(WORDS).argmax(dim=1)
    parts = [slice(k, k + 1) for k in range(len(WORDS))]
    radius = certified_radius(net, WORDS, labels, frames=[0, 1], tol=0.02)
    alone = [certified_radius(net, WORDS[k], labels[k], frames=[0, 1], tol=0.02) for k in parts[:2]]
    torch.testing.assert_close(radius[:2], torch.cat(alone), rtol=0.03, atol=0)
    eps = torch.linspace(0.1, 0.4, len(WORDS)).double()
    for how in ({}, {"method": "alpha", "alpha_steps": 2}):
        margins = certified_margin(net, WORDS, labels, eps, **how)
        alone = [certified_margin(net, WORDS[k], labels[k], eps[k], **how) for k in parts]
        rtol = 1e-2 if how else 1e-7  # slopes are tuned in single precision, to samples together
        torch.testing.assert_close(margins, torch.cat(alone), rtol=rtol, atol=1e-6)
    attacked = pgd(net, WORDS, labels, eps, steps=8, restarts=1)
    assert (attacked.margin >= margins.amin(dim=1)).all()
    for k, sentence in enumerate(WORDS):
        scores = of_vectors(net, sentence)(attacked.x[k : k + 1])[0]
        torch.testing.assert_close(scores[labels[k]] - scores[1 - labels[k]], attacked.margin[k], rtol=1e-7, atol=1e-9)


def test_gradients_are_sums_over_all_groups():
    net = made("masked mean").requires_grad_(True)
    labels = net(WORDS).argmax(dim=1)
    weights = (net.rnn.weight_ih_l0, net.head.weight)

    def gradients(samples):
        return torch.autograd.grad(certified_margin(net, WORDS[samples], labels[samples], 0.05).sum(), weights)

    alone = [gradients(slice(k, k + 1)) for k in range(len(WORDS))]
    for whole, *parts in zip(gradients(slice(None)), *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-7, atol=1e-9)


def test_replaced_words_have_the_masks_of_their_sentence():
    net = made("masked mean")
    labels = net(WORDS).argmax(dim=1)
    numbers = torch.stack((WORDS, torch.where(WORDS > 0, 10, 0), torch.where(WORDS > 0, 11, 0)), dim=2)
    valid = (WORDS > 0)[..., None].expand(-1, -1, 3)
    substitutes = Substitutes.of_words(net.embedding, numbers, valid)
    margins = certified_margin(net, WORDS, labels, 1, substitutions=substitutes, dtype=torch.float64)
    for k, place in ((k, place) for k in range(len(WORDS)) for place in range(4) if WORDS[k, place]):
        for word in (10, 11):
            changed = WORDS[k : k + 1].clone()
            changed[0, place] = word
            scores = net(changed)[0]
            assert scores[labels[k]] - scores[1 - labels[k]] >= margins[k].amin() - 1e-9


def test_one_graph_for_samples_that_have_the_same_mask(monkeypatch):
    built = []
    monkeypatch.setattr(TracedModule, "_check", lambda self, graph: built.append(len(self.x)))
    many = torch.cat((WORDS, WORDS[[0, 3, 3]]))
    output_bounds(made("masked mean"), many, EPS)
    assert sorted(built) == [1, 1, 5]  # lengths 2, 4 and 3
    built.clear()
    output_bounds(nn.Sequential(nn.Embedding(12, 3), nn.Flatten(), nn.Linear(12, 2)), many, EPS)
    assert built == [7]


# --- broken versions, which the tests above must catch ----------------------------------------------------------------


def test_masks_of_another_sample_are_caught(monkeypatch):
    monkeypatch.setattr(groups, "_constants", lambda module, x, extra: [()] * len(x))
    net = made("masked mean")
    with pytest.raises(UnsupportedError, match="computes something else"):
        output_bounds(net, WORDS, EPS, norm=INF)
    monkeypatch.setattr(TracedModule, "agrees", lambda self, *given: True)
    bounds = output_bounds(net, WORDS, EPS, norm=INF)
    with pytest.raises(AssertionError):
        check_inside(net, WORDS, bounds)
    with pytest.raises(AssertionError):
        check_like_cut(net, WORDS, bounds)


def test_states_of_pads_that_leak_are_caught(monkeypatch):
    def leaking(builder, x, lengths, batch_first):
        return sequences._pack(builder, x, torch.full_like(lengths, x.shape[1]), batch_first)

    monkeypatch.setitem(sequences.OPERATIONS, "_pack_padded_sequence", leaking)
    net = made("packed GRU")
    with pytest.raises(UnsupportedError, match="computes something else"):
        output_bounds(net, WORDS, EPS, norm=INF)
    monkeypatch.setattr(TracedModule, "agrees", lambda self, *given: True)
    bounds = output_bounds(net, WORDS, EPS, norm=INF)
    with pytest.raises(AssertionError):
        check_inside(net, WORDS, bounds)
    with pytest.raises(AssertionError):
        check_like_cut(net, WORDS, bounds)


# --- what is refused --------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.one, self.other, self.head = nn.Embedding(12, SIZE), nn.Embedding(12, SIZE), nn.Linear(SIZE, 2)
        self.function = function

    def forward(self, words):
        return self.head(self.function(self, words).sum(1))


@pytest.mark.parametrize(
    "message, function",
    [
        ("two embeddings", lambda net, words: net.one(words) + net.other(words)),
        ("after a change in the same table", lambda net, words: net.one(words) + net.one(words.clamp(max=3))),
        ("as they are", lambda net, words: net.one(words.clamp(max=3))),
        ("changed in place", lambda net, words: net.one(words.clamp_(max=3))),
        ("for a batch than for its samples", lambda net, words: net.one(words) * (words[:1] != 0).unsqueeze(-1)),
    ],
)
def test_what_is_refused(message, function):
    with pytest.raises(UnsupportedError, match=message):
        output_bounds(Refused(function).eval(), WORDS, EPS)


def test_numbers_that_are_computed_are_constant_in_a_table_of_their_own():
    with pytest.raises(UnsupportedError, match="same table"):
        output_bounds(Refused(lambda net, words: net.one(words) + net.one.weight[words % 3]), WORDS, EPS)
    net = Refused(lambda net, words: net.one(words).tanh() + net.other((words != 0).cumsum(1))).double().eval()
    bounds = output_bounds(net, WORDS, EPS, norm=INF)
    middle = net(WORDS)
    assert (bounds.lower <= middle).all() and (middle <= bounds.upper).all()


def test_a_reading_of_several_kinds_has_no_graph_of_its_own():
    with pytest.raises(UnsupportedError, match="of their own"):
        trace(made("masked mean"), WORDS)
    graph = trace(made("masked mean"), WORDS[:1])
    torch.testing.assert_close(
        graph.evaluate(made("masked mean").embedding(WORDS[:1])), made("masked mean")(WORDS[:1]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_bags_of_words(mode, offsets):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(12, SIZE, mode=mode, padding_idx=None if offsets else 0)
            self.head = nn.Linear(SIZE, 2)

        def forward(self, words):
            if not offsets:
                return self.head(self.embedding(words).tanh())
            mask = words != 0
            starts = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)[:-1]))
            return self.head(self.embedding(words[mask], starts).tanh())

    net = Bag().double().eval().requires_grad_(False)
    bounds = output_bounds(net, WORDS, EPS, norm=INF)

    for k, sentence in enumerate(WORDS):
        mask = (sentence != 0).double()[:, None]
        total = mask.sum() if mode == "mean" else 1.0

        def by_hand(vectors, mask=mask, total=total):
            if mode == "max":
                return net.head(vectors[:, mask[:, 0] > 0].amax(1).tanh())
            return net.head(((vectors * mask).sum(1) / total).tanh())

        vectors = net.embedding.weight[sentence][None]
        least, most = extremes(by_hand, vectors, EPS, INF)
        assert (least[0] >= bounds.lower[k] - 1e-9).all() and (most[0] <= bounds.upper[k] + 1e-9).all()
        graph = trace(Hand(by_hand), vectors)
        same = output_bounds(graph, vectors, EPS, norm=INF)
        torch.testing.assert_close(bounds.lower[k], same.lower[0], rtol=1e-7, atol=1e-9)


class Hand(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, vectors):
        return self.function(vectors)
