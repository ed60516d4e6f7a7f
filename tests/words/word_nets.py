"""Small networks over words, sets of substitutes, and all their sentences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from utils.network import SequenceClassifier
from utils.network.transformer import SequenceTransformer

N, T, S = 4, 3, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recurrent(kind: str, hidden: int = 5, **settings) -> SequenceClassifier:
    bidirectional = settings.pop("bidirectional", False)
    rnn = getattr(nn, kind)(N, hidden, batch_first=True, bidirectional=bidirectional, **settings)
    head = nn.Linear(hidden * (1 + bidirectional), 3)
    return SequenceClassifier(rnn, head, pooling="mean" if bidirectional else "last")


class Bag(nn.Module):
    """A feed-forward net on the mean of a layer's values."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(N, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(x).relu().mean(dim=1)).tanh())


class MaxOverTime(nn.Module):
    """A GRU whose states are pooled by their maxima."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(N, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].amax(dim=1))


class Stock(nn.Module):
    """PyTorch's own layer of a Transformer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(N, 2, 5, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


def transformer(**settings) -> SequenceTransformer:
    return SequenceTransformer(N, 3, width=4, heads=2, inner=6, **settings)


NETS = {
    "lstm, both directions": lambda: recurrent("LSTM", bidirectional=True),
    "gru": lambda: recurrent("GRU"),
    "relu rnn": lambda: recurrent("RNN", nonlinearity="relu"),
    "bag": Bag,
    "max over time": MaxOverTime,
    "transformer": transformer,
    "two layers": lambda: transformer(layers=2, max_frames=6),
    "standard norm": lambda: transformer(layer_norm="standard"),
    "two layers, standard": lambda: transformer(layers=2, layer_norm="standard"),
    "torch's layer": Stock,
}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = NETS[name]().double().eval().requires_grad_(False)
    for number, parameter in enumerate(net.parameters()):  # beginnings are too small to matter
        parameter.add_(0.6 * normal(*parameter.shape, seed=number + 100 * seed))
    return net


def words(batch: int = 2, seed: int = 0, size: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """x, (batch, T, n), vectors of substitutes, (batch, T, S, n), and which there are; one word has only one."""
    x = normal(batch, T, N, seed=seed)
    valid = torch.ones(batch, T, S, dtype=torch.bool)
    valid[0, 1, 1] = False
    valid[-1, 2] = False
    return x, x[:, :, None] + size * normal(batch, T, S, N, seed=seed + 1), valid


def sentences(x: Tensor, vectors: Tensor, valid: Tensor, budget: int) -> Tensor:
    """All sentences of one sample, x (T, n), with at most so many words changed, (number, T, n)."""
    choices = [
        [row, *(new for new, there in zip(news, flags, strict=True) if there)]
        for row, news, flags in zip(x, vectors, valid, strict=True)
    ]
    found = []
    for picks in itertools.product(*(range(len(options)) for options in choices)):
        if sum(pick > 0 for pick in picks) <= budget:
            found.append(torch.stack([options[pick] for options, pick in zip(choices, picks, strict=True)]))
    return torch.stack(found)


def made_recurrent(kind: str, seed: int = 0, **settings) -> SequenceClassifier:
    """A small recurrent classifier whose parameters matter."""
    torch.manual_seed(seed)
    net = recurrent(kind, **settings).double().eval().requires_grad_(False)
    for number, parameter in enumerate(net.parameters()):
        parameter.add_(0.5 * normal(*parameter.shape, seed=number + 100 * seed))
    return net
