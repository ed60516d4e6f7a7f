"""ONNX's control flow, which must not depend on the input: branches are chosen, loops unrolled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..symbolic import Symbol, UnsupportedError, join
from .table import Value, operator, symbol, whole_numbers

SCAN_OPSET = 9
MAX_TRIPS = 10_000  # of a loop


@operator("If")
def _if(reader, condition, then_branch, else_branch):
    return reader.subgraph(then_branch if bool(whole_numbers(condition)[0]) else else_branch, [])


@operator("Loop")
def _loop(reader, trips=None, going=None, *carried, body):
    """A loop whose trips and conditions do not depend on the input, step by step."""
    trips = MAX_TRIPS + 1 if trips is None else whole_numbers(trips)[0]
    going = going is None or bool(whole_numbers(going)[0])
    states, rows = list(carried), []
    while going and len(rows) < trips:
        if len(rows) == MAX_TRIPS:
            raise UnsupportedError(f"the loop goes on after {MAX_TRIPS} steps")
        condition, *found = reader.subgraph(body, [torch.tensor(len(rows)), torch.tensor(True), *states])
        going = bool(whole_numbers(condition)[0])
        states, scanned = found[: len(states)], found[len(states) :]
        rows.append(scanned)
    if not rows and len(body.output) > 1 + len(states):
        raise UnsupportedError("the loop has no steps, but its steps are collected")
    return [*states, *(_stacked(parts) for parts in zip(*rows, strict=True))]


@operator("Scan")
def _scan(
    reader,
    *given,
    body,
    num_scan_inputs,
    scan_input_axes=None,
    scan_input_directions=None,
    scan_output_axes=None,
    scan_output_directions=None,
):
    """A loop over slices of some inputs, step by step; directions are 0 forwards and 1 backwards."""
    if reader.opsets[""] < SCAN_OPSET:
        raise UnsupportedError(f"before opset {SCAN_OPSET} it has a batch of loops: export it in a newer opset")
    states, scanned = list(given[:-num_scan_inputs]), given[-num_scan_inputs:]
    axes, backwards = scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs
    steps = scanned[0].shape[axes[0]]
    if any(part.shape[axis] != steps for part, axis in zip(scanned, axes, strict=True)):
        raise UnsupportedError("its inputs have different numbers of steps")
    rows = []
    for step in range(steps):
        places = [steps - 1 - step if backward else step for backward in backwards]
        slices = [_slice(*part) for part in zip(scanned, axes, places, strict=True)]
        found = reader.subgraph(body, [*states, *slices])
        states, own = found[: len(states)], found[len(states) :]
        rows.append(own)
    collected = list(zip(*rows, strict=True))
    out_axes, reverse = scan_output_axes or [0] * len(collected), scan_output_directions or [0] * len(collected)
    ordered = [parts[::-1] if backward else parts for parts, backward in zip(collected, reverse, strict=True)]
    return [*states, *(_stacked(*part) for part in zip(ordered, out_axes, strict=True))]


def _slice(value: Value, axis: int, place: int) -> Value:
    return value.view(lambda part: part.select(axis, place)) if isinstance(value, Symbol) else value.select(axis, place)


def _stacked(parts: Sequence[Value], axis: int = 0) -> Value:
    if any(isinstance(part, Symbol) for part in parts):
        return join(lambda tensors: torch.stack(tuple(tensors), dim=axis), [symbol(part) for part in parts])
    return torch.stack(tuple(parts), dim=axis)


CONTROL = ("If", "Loop", "Scan")
