"""auto_LiRPA's bounds of a relu network whose weights move, written down in plain terms, to compare with.

Of a product of a weight in [W - eps, W + eps] and an input h in [l, u] it takes the planes

    W' h  >=  l W' + (W - eps) h - (W - eps) l,        W' h  <=  u W' + (W - eps) h - (W - eps) u,

collects the coefficients of W', and takes eps times their dual norm off, Frobenius's or the sum of absolute values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lower_bounds(layers: list[tuple[Tensor, Tensor]], x: Tensor, rows: Tensor, eps: float, norm: float) -> Tensor:
    """Of ``rows @ output``, (batch, n_rows), rows (batch, n_rows, size), every layer bounded by a backward pass."""
    boxes = []
    for depth in range(1, len(layers)):
        size = len(layers[depth - 1][1])
        unit = torch.eye(size, dtype=x.dtype).expand(len(x), -1, -1)
        both = _backward(layers[:depth], boxes, x, torch.cat((unit, -unit), dim=1), eps, norm)
        lower, minus_upper = both.split(size, dim=1)
        boxes.append((lower, -minus_upper))
    return _backward(layers, boxes, x, rows, eps, norm)


def _backward(layers, boxes, x, rows, eps, norm) -> Tensor:
    total, a = 0.0, rows
    for (weight, bias), box in reversed(list(zip(layers[1:], boxes, strict=True))):
        up, down = a.clamp(min=0.0), a.clamp(max=0.0)
        low, high = box[0].clamp(min=0.0), box[1].clamp(min=0.0)
        least = weight - eps
        of_weight = up[..., None] * low[:, None, None] + down[..., None] * high[:, None, None]
        total = total + a @ bias + (of_weight * weight).sum(dim=(-2, -1)) - eps * _dual(of_weight.flatten(2), norm)
        total = total - ((up @ least) * low[:, None]).sum(-1) - ((down @ least) * high[:, None]).sum(-1)
        a = a @ least
        up, down = a.clamp(min=0.0), a.clamp(max=0.0)
        below, above = box
        upper_slope = torch.where(below >= 0, 1.0, torch.where(above <= 0, 0.0, above / (above - below)))
        lower_slope = torch.where(below >= 0, 1.0, torch.where(above <= 0, 0.0, (above > -below).to(a)))
        intercept = torch.where((below < 0) & (above > 0), -below * above / (above - below), 0.0)
        total = total + (down * intercept[:, None]).sum(-1)
        a = up * lower_slope[:, None] + down * upper_slope[:, None]
    weight, bias = layers[0]
    return total + ((a @ weight) * x[:, None]).sum(-1) + a @ bias - eps * _dual(a, norm) * _dual(x, norm)[:, None]


def _dual(vectors: Tensor, norm: float) -> Tensor:
    return vectors.norm(dim=-1) if norm == 2 else vectors.abs().sum(dim=-1)
