"""The classifiers that are trained and certified: a stock torch RNN, LSTM or GRU under a linear head, and MLPs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

POOLINGS = ("last", "mean")


class SequenceClassifier(nn.Module):
    """Logits of a sequence: ``head(pool(rnn((x - mean) / std)))``.

    Normalisation is the model's first layer, so a perturbation of radius eps is always measured in the
    units of ``x``.

    Args:
        rnn: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` with ``batch_first=True``; any number of layers and directions.
        head: ``nn.Linear`` from the state size (times two if bidirectional) to the number of classes.
        pooling: "last" reads the top layer's final state (of each direction), "mean" averages its outputs over
            the frames.
        mean, std: numbers or (n,) tensors, subtracted from and divided into every frame.
        state: the initial state, (layers * directions, hidden), or a pair (h0, c0) of these for an LSTM;
            zeros if left out.
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        head: nn.Linear,
        *,
        pooling: str = "last",
        mean: float | Tensor = 0.0,
        std: float | Tensor = 1.0,
        state: Tensor | tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        check_parts(rnn, head, pooling)
        self.rnn, self.head, self.pooling = rnn, head, pooling
        like = head.weight
        self.register_buffer("mean", torch.as_tensor(mean, dtype=like.dtype), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=like.dtype), persistent=False)
        h0, c0 = state if isinstance(state, (tuple, list)) else (state, None)
        if isinstance(rnn, nn.LSTM) and h0 is not None and c0 is None:
            raise ValueError("an LSTM's initial state is a pair (h0, c0)")
        self.register_buffer("h0", h0, persistent=False)
        self.register_buffer("c0", c0, persistent=False)
        self.register_load_state_dict_pre_hook(_accept_stock_names)

    is_bare = True  # nothing but normalisation comes before the recurrent layer

    @property
    def input_size(self) -> int:
        """Values of a frame of x."""
        return self.rnn.input_size

    def enter(
        self, graph, frames: list[tuple], lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[list, Tensor | None]:
        """Add to a graph what comes before the recurrent layer's frames: nothing; and the lengths that remain."""
        return frames, lengths

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits, (batch, classes), of x, (batch, T, n); frames at and after ``lengths`` (batch,) do not count."""
        frames = (x - self.mean) / self.std
        if lengths is not None:
            frames = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = self.rnn(frames, self._initial_state(x.shape[0]))
        if self.pooling == "last":
            hidden = state[0] if isinstance(self.rnn, nn.LSTM) else state
            directions = 2 if self.rnn.bidirectional else 1
            return self.head(torch.cat(tuple(hidden[-directions:]), dim=-1))
        if lengths is None:
            return self.head(outputs.mean(dim=1))
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)  # zeros after the end of each sequence
        return self.head(outputs.sum(dim=1) / lengths.to(outputs)[:, None])

    def _initial_state(self, batch: int):
        if self.h0 is None:
            return None
        h0 = self.h0[:, None].expand(-1, batch, -1).contiguous()
        if self.c0 is None:
            return h0
        return h0, self.c0[:, None].expand(-1, batch, -1).contiguous()


MLP_ACTIVATIONS = {
    "relu": torch.relu,
    "leaky": nn.functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "arctan": torch.arctan,
    "elu": nn.functional.elu,
    "softplus": nn.functional.softplus,
}


class MLP(nn.Module):
    """A multi-layer perceptron: linear layers with an activation between them; inputs of any shape are flattened.

    Args:
        sizes: of the input, the hidden layers and the output.
        activation: a key of ``MLP_ACTIVATIONS``.
        leaky_slope: slope of "leaky" below 0.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", leaky_slope: float = 0.01, dtype=torch.float32):
        super().__init__()
        self.activation, self.leaky_slope = activation, leaky_slope
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=dtype) for n, m in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        h = x.flatten(1)
        settings = {"negative_slope": self.leaky_slope} if self.activation == "leaky" else {}
        for layer in self.layers[:-1]:
            h = MLP_ACTIVATIONS[self.activation](layer(h), **settings)
        return self.layers[-1](h)


def check_parts(rnn: nn.Module, head: nn.Module, pooling: str) -> None:
    """Raise ValueError, saying what to change, if the parts do not make a classifier that can be bounded."""
    if not isinstance(rnn, (nn.RNN, nn.LSTM, nn.GRU)):
        raise ValueError(f"rnn must be nn.RNN, nn.LSTM or nn.GRU, not {type(rnn).__name__}")
    if not rnn.batch_first:
        raise ValueError("the recurrent layer must be built with batch_first=True")
    if rnn.proj_size:
        raise ValueError("proj_size is not supported: build the LSTM without it and put an nn.Linear on top")
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head must be nn.Linear, not {type(head).__name__}")
    width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
    if head.in_features != width:
        raise ValueError(f"the head takes {head.in_features} inputs, the recurrent layer gives {width}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")


def _accept_stock_names(module, state_dict, prefix, *_):
    """Let the names of a bare nn.RNN/LSTM/GRU (weight_ih_l0, ...) load as well as those under "rnn."."""
    stock = set(module.rnn.state_dict())
    for key in list(state_dict):
        name = key[len(prefix) :]
        if key.startswith(prefix) and name in stock:
            state_dict[f"{prefix}rnn.{name}"] = state_dict.pop(key)
