"""ONNX's recurrent layers, in its orders of gates, directions and initial states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..symbolic import Symbol, UnsupportedError, constant, join
from .layers import check_weights
from .table import OPERATORS, Handler, Value, symbol

# Blocks of ONNX's gates, (i, o, f, c) and (z, r, h), in torch's order, (i, f, g, o) and (r, z, n).
GATE_ORDER = {"RNN": (0,), "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
DEFAULT_ACTIVATIONS = {"RNN": ("tanh",), "LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}


def _recurrent(kind: str) -> Handler:
    def handler(reader, x, w, r, b=None, lengths=None, h0=None, c0=None, peepholes=None, **attributes):
        check_weights(w, r, b, lengths, peepholes)
        directions = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
        backwards = directions[attributes.get("direction", "forward")]
        layout = attributes.get("layout", 0)
        size = r.shape[-1]
        nonlinearity = _check_recurrent(kind, attributes, len(backwards), peepholes)
        cell = "gru, reset first" if kind == "GRU" and not attributes.get("linear_before_reset", 0) else kind.lower()
        x = symbol(x)
        batch, batch_axis = x.shape[0 if layout else 1], 0 if layout else 1
        if batch != 1:
            rows = [[_row(part, k, batch_axis) for part in (x, h0, c0)] for k in range(batch)]
            own = [None if lengths is None else lengths[k : k + 1] for k in range(batch)]
            made = [
                handler(reader, x, w, r, b, length, h0, c0, peepholes, **attributes)
                for (x, h0, c0), length in zip(rows, own, strict=True)
            ]
            axes = (0 if layout else 2, batch_axis, batch_axis)  # of the steps, and of the last states
            parts = zip(axes, zip(*made, strict=True), strict=False)
            return [join(lambda rows, axis=axis: torch.cat(rows, dim=axis), list(part)) for axis, part in parts]
        if layout:
            x = x.view(lambda part: part.transpose(0, 1))
        steps = x.shape[0]
        count = steps if lengths is None else _common_length(lengths, steps)
        zeros = constant(torch.zeros(len(backwards), batch, size))
        given = (h0, c0) if kind == "LSTM" else (h0,)
        states = [zeros if part is None else symbol(part) for part in given]
        if layout:
            states = [
                s if part is None else s.view(lambda p: p.transpose(0, 1))
                for s, part in zip(states, given, strict=True)
            ]
        frames = [x.view(lambda part, t=t: part[t]) for t in range(count)]
        order = GATE_ORDER[kind]
        runs, finals = [], []
        for number, backward in enumerate(backwards):
            own = [_gates(part[number], order) for part in (w, r)]
            halves = (None, None) if b is None else (_gates(half, order) for half in b[number].chunk(2))
            start = tuple(state.view(lambda part, k=number: part[k]) for state in states)
            hidden, final = reader.builder.recurrent(
                cell, frames, start, (*own, *halves), nonlinearity[number], backward
            )
            runs.append(hidden + [constant(torch.zeros(batch, size))] * (steps - count))
            finals.append(final)
        y = join(lambda parts: torch.stack(parts, dim=1), [join(torch.stack, run) for run in runs])  # (T, D, batch, H)
        last = [join(torch.stack, parts) for parts in zip(*finals, strict=True)]  # (D, batch, H)
        if layout:
            y = y.view(lambda part: part.permute(2, 0, 1, 3))
            last = [part.view(lambda p: p.transpose(0, 1)) for part in last]
        return [y, *last]

    return handler


def _row(value: Value | None, k: int, axis: int) -> Symbol | None:
    """One sequence of a batch."""
    return None if value is None else symbol(value).view(lambda part: part.narrow(axis, k, 1))


for _kind in GATE_ORDER:
    OPERATORS[_kind] = _recurrent(_kind)


def _gates(stacked: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rows of the gates' blocks, in torch's order."""
    blocks = stacked.chunk(len(order))
    return torch.cat([blocks[number] for number in order])


def _common_length(lengths: Tensor, steps: int) -> int:
    counts = set(lengths.tolist())
    if len(counts) != 1 or not 1 <= min(counts) <= steps:
        raise UnsupportedError(f"sequence lengths must be from 1 to {steps}")
    return counts.pop()


def _check_recurrent(kind: str, attributes: dict, directions: int, peepholes) -> list[str]:
    """The nonlinearity of each direction. Raises UnsupportedError for variants that have no cell here."""
    default = DEFAULT_ACTIVATIONS[kind]
    names = [name.lower() for name in attributes.get("activations") or default * directions]
    if kind == "RNN":
        if any(name not in ("tanh", "relu") for name in names):
            raise UnsupportedError(f"activations {names} are not supported")
    elif names != list(default * directions):
        raise UnsupportedError(f"activations {names} are not supported")
    if attributes.get("clip"):
        raise UnsupportedError("clip is not supported")
    if attributes.get("input_forget"):
        raise UnsupportedError("input_forget is not supported")
    if peepholes is not None and bool((peepholes != 0).any()):
        raise UnsupportedError("peepholes are not supported")
    return names if kind == "RNN" else ["tanh"] * directions
