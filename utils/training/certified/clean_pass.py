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
    """Meanwhile the layer is a fixed map: torch's own function takes no gradients in statistics."""
    factor = (variance + layer.eps).rsqrt()
    factor = factor if layer.weight is None else factor * layer.weight
    shift = -mean * factor if layer.bias is None else layer.bias - mean * factor

    def forward(x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return x * factor.reshape(shape) + shift.reshape(shape)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
