"""A Transformer that classifies a sequence of vectors by what its [CLS] row becomes.

With x_1 ... x_T between two vectors of its own,

    h = norm(entry([CLS], x_1, ..., x_T, [SEP]))
    h = norm(h + out(attention(h)));   h = norm(h + outer(relu(inner(h))))            in each layer
    logits = head(tanh(pooler(h at [CLS])))

Before the entry the vectors of places are added, if it has any. The attention of each head is
softmax(q k' / sqrt(width of a head)) v.  There is no mask: all sequences of a batch have one length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LAYER_NORMS = ("no-variance", "standard")
NORM_EPS = 1e-12
FIRST_SCALE = 0.02  # standard deviation of the first random vectors of [CLS], [SEP] and places


class Centred(nn.Module):
    """weight (x - mean of x) + bias over the last axis: layer normalisation without its division, so it is linear.

    It is computed as one product with a matrix, which is quicker to read and to bound than a mean and a difference.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        width = len(self.weight)
        centring = torch.eye(width).to(self.weight) - 1.0 / width
        return nn.functional.linear(x, self.weight[:, None] * centring, self.bias)


def make_norm(kind: str, width: int) -> nn.Module:
    return Centred(width) if kind == "no-variance" else nn.LayerNorm(width, eps=NORM_EPS)


class SequenceTransformer(nn.Module):
    """Logits, (batch, classes), of sequences x, (batch, T, n), all of one length.

    Args:
        input_size: n, numbers in a vector.
        width, heads, inner: of the layers: of a row, its heads, and the hidden layer of the feed-forward part.
        layers: how many.
        layer_norm: "no-variance" or "standard".
        max_frames: longest T, for which there are vectors of places; None: places do not count.

    Raises:
        ValueError: heads do not divide the width, or there is no such layer_norm.
    """

    def __init__(
        self,
        input_size: int = 64,
        classes: int = 2,
        *,
        width: int = 64,
        heads: int = 4,
        inner: int = 128,
        layers: int = 1,
        layer_norm: str = "no-variance",
        max_frames: int | None = None,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        if layer_norm not in LAYER_NORMS:
            raise ValueError(f"layer_norm must be one of {', '.join(LAYER_NORMS)}, not {layer_norm!r}")
        self.input_size, self.max_frames = input_size, max_frames
        self.first, self.last = (nn.Parameter(FIRST_SCALE * torch.randn(input_size)) for _ in range(2))
        places = None if max_frames is None else nn.Parameter(FIRST_SCALE * torch.randn(max_frames + 2, input_size))
        self.register_parameter("places", places)
        self.entry, self.entry_norm = nn.Linear(input_size, width), make_norm(layer_norm, width)
        self.layers = nn.ModuleList(Layer(width, heads, inner, layer_norm) for _ in range(layers))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.max_frames is not None and x.shape[1] > self.max_frames:
            raise ValueError(f"a sequence of {x.shape[1]} is longer than the {self.max_frames} places that there are")
        ends = x.shape[0], 1, self.input_size
        h = torch.cat((self.first.expand(ends), x, self.last.expand(ends)), dim=1)
        if self.places is not None:
            h = h + self.places[: x.shape[1] + 2]
        h = self.entry_norm(self.entry(h))
        for layer in self.layers[:-1]:
            h = layer(h)
        h = self.layers[-1](h, rows=1)  # of the last layer only the row of [CLS] is read
        return self.head(torch.tanh(self.pooler(h[:, 0])))


class Layer(nn.Module):
    """Attention and feed-forward part, each added to its input and then normalised."""

    def __init__(self, width: int, heads: int, inner: int, layer_norm: str):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = make_norm(layer_norm, width)
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.output_norm = make_norm(layer_norm, width)

    def forward(self, h: Tensor, rows: int | None = None) -> Tensor:
        """(batch, rows, width) of h, (batch, T, width): of its first ``rows``, which read all, or of all of them."""
        own = h if rows is None else h[:, :rows]
        scores = torch.matmul(self._split(self.query(own)), self._split(self.key(h)).transpose(-1, -2))
        weights = torch.softmax(scores / math.sqrt(self.size), dim=-1)
        context = torch.matmul(weights, self._split(self.value(h))).transpose(1, 2).reshape(own.shape)
        own = self.attention_norm(own + self.out(context))
        return self.output_norm(own + self.outer(torch.relu(self.inner(own))))

    def _split(self, values: Tensor) -> Tensor:
        """(batch, heads, T, size) of (batch, T, width)."""
        return values.reshape(values.shape[0], values.shape[1], self.heads, self.size).transpose(1, 2)
