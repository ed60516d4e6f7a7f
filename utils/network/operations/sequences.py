"""Sequences of different lengths, packed, and bags of words: all lengths are constants of their samples.

Samples that are traced together are alike, so packed sequences all have the same number of steps: to pack them is to
leave out the frames after the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..symbolic import Symbol, UnsupportedError, constant, join
from ..trace import LOOKUPS, OPERATIONS, Handler, Reading, Tokens, Traced, looked_up, operation, plain_words
from .functions import amax

UNLIKE = "packed sequences are read where the lengths of all samples that are read together are the same"


# --- packing ---


@operation("_pack_padded_sequence")
def _pack(builder, x, lengths, batch_first):
    """Elements by steps, (steps * batch, n), and the number of samples that have each step."""
    steps = int(lengths[0])
    if not bool((lengths == steps).all()):
        raise UnsupportedError(UNLIKE)
    by_steps = x.view(lambda part: part.transpose(0, 1)) if batch_first else x
    if not 0 < steps <= by_steps.shape[0]:
        raise UnsupportedError(f"lengths must be from 1 to {by_steps.shape[0]}, not {steps}")
    batch = by_steps.shape[1]
    return by_steps.view(lambda part: part[:steps].flatten(0, 1)), torch.full((steps,), batch)


def _steps(data: Symbol, sizes: Tensor) -> Symbol:
    """Packed elements as (steps, batch, n)."""
    if not bool((sizes == sizes[0]).all()):
        raise UnsupportedError(UNLIKE)
    return data.view(lambda part: part.unflatten(0, (len(sizes), int(sizes[0]))))


@operation("_pad_packed_sequence")
def _unpack(builder, data, sizes, batch_first, padding_value=0.0, total_length=-1):
    """Steps padded to the total length, and the lengths."""
    x, steps, batch = _steps(data, sizes), len(sizes), int(sizes[0])
    if total_length > steps:
        pads = torch.full((total_length - steps, *x.shape[1:]), float(padding_value), dtype=torch.float64)
        x = join(torch.cat, [x, constant(pads)])
    return x.view(lambda part: part.transpose(0, 1)) if batch_first else x, torch.full((batch,), steps)


def _packed(layer: Handler) -> Handler:
    """A recurrent layer, called with (x, state, ...) or, of packed sequences, with (data, sizes, state, ...)."""

    def handler(builder, x, second, *others):
        if not isinstance(second, Tensor) or second.is_floating_point():
            return layer(builder, x, second, *others)
        output, *final = layer(builder, _steps(x, second), *others)
        return output.view(lambda part: part.flatten(0, 1)), *final

    return handler


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    OPERATIONS[_name] = _packed(OPERATIONS[_name])


# --- bags of words ---


def _bag(
    reading: Reading,
    tokens: Tokens,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Traced:
    """nn.EmbeddingBag of words (batch, T), or of all words in a row and where each bag begins."""
    vectors, words = looked_up(reading, tokens, weight, max_norm), plain_words(tokens)
    shares = torch.ones(words.shape, dtype=torch.float64)
    if padding_idx is not None:
        shares = (words != padding_idx % len(weight)).to(shares)
    if per_sample_weights is not None:
        if isinstance(per_sample_weights, Traced):
            raise UnsupportedError("weights of words must not depend on the input")
        shares = shares * plain_words(per_sample_weights).detach().to(shares)
    bags = _bags(words, None if offsets is None else plain_words(offsets).tolist(), include_last_offset)
    own = torch.stack([shares[bag] for bag in bags]) if len({len(shares[bag]) for bag in bags}) == 1 else None
    if own is None or not bool((own == own[:1]).all()):
        raise UnsupportedError("bags are read where there is one a sample")
    chosen = join(torch.stack, [vectors.view(lambda part, bag=bag: part[bag]) for bag in bags])
    if mode == "max":
        return Traced.of(reading.builder, _greatest(reading, chosen, own[0] > 0), weight)
    total = own.sum(dim=1, keepdim=True) if mode == "mean" else torch.ones(len(own), 1)
    factors = torch.where(total > 0, own / total.clamp(min=1e-300), 0.0).unsqueeze(-1)
    made = reading.builder.sum(reading.builder.scaled(chosen, constant(factors)), (1,))
    return Traced.of(reading.builder, made, weight)


def _greatest(reading: Reading, chosen: Symbol, counted: Tensor) -> Symbol:
    """Of the words that count, (batch, words, n); zeros if none does."""
    if not bool(counted.any()):
        return constant(torch.zeros(chosen.shape[0], chosen.shape[2]))
    return amax(reading.builder, chosen.view(lambda part: part[:, counted]), 1)


def _bags(words: Tensor, offsets: list[int] | None, include_last: bool) -> list[tuple]:
    """Which words make each bag: indices into the words."""
    if offsets is None:
        return [(row, slice(None)) for row in range(len(words))]
    ends = offsets[1:] if include_last else [*offsets[1:], len(words)]
    return [(slice(start, end),) for start, end in zip(offsets, ends, strict=False)]


LOOKUPS["embedding_bag"] = _bag
