"""Layers that normalise over the batch, in certified training: they take the statistics of the clean batch.

Bounds need layers whose maps are fixed. Those of a batch are fixed by a forward pass of its clean images, and gradients
flow through them (Gowal et al. 2018 and Shi et al. 2021 do so).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def clean_pass(model: nn.Module, x: Tensor) -> Iterator[Tensor | None]:
    """Gives the logits of x, (batch, classes); meanwhile the model normalises by the statistics of x.

    None, and nothing is run, where no layer of the model is about to normalise over a batch. Running statistics move by
    one step.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.training]
    if not layers:
        yield None
        return
    seen: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    def look(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if layer in seen:
            raise ValueError("a normalisation that is used twice has no statistics of its own: give each use a layer")
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], axes, correction=0)
        seen[layer] = mean, variance

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        logits = model(x)
    with ExitStack() as changed:
        for layer, statistics in seen.items():
            changed.enter_context(_fixed(layer, *statistics))
        yield logits


@contextmanager
def _fixed(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> Iterator[None]:
    before = layer.running_mean, layer.running_var
    layer.running_mean, layer.running_var, layer.training = mean, variance, False
    try:
        yield
    finally:
        layer.running_mean, layer.running_var = before
        layer.training = True
