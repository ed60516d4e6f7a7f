"""l_p balls: dual norms, projection, steepest direction, random points.

All functions work on vectors along the last dimension, for p = 1, 2 and inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INF = math.inf
NORMS = (1.0, 2.0, INF)


def dual_norm(coefficients: Tensor, norm: float) -> Tensor:
    """||A||_q over the last dimension, 1/p + 1/q = 1: the most that A delta can change per unit of ||delta||_p."""
    if norm == 1.0:
        return coefficients.abs().amax(dim=-1)
    if norm == 2.0:
        return torch.linalg.vector_norm(coefficients, dim=-1)
    return coefficients.abs().sum(dim=-1)


def lp_norm(vectors: Tensor, norm: float) -> Tensor:
    """||v||_p over the last dimension."""
    return torch.linalg.vector_norm(vectors, ord=norm, dim=-1)


def project(vectors: Tensor, eps: Tensor, norm: float) -> Tensor:
    """The point nearest (in l_2) to v with ||v||_p <= eps; eps has the shape of v without its last dimension."""
    eps = eps[..., None]
    if norm == INF:
        return torch.minimum(torch.maximum(vectors, -eps), eps)
    if norm == 2.0:
        length = lp_norm(vectors, norm)[..., None]
        return vectors * torch.where(length > eps, eps / length, 1.0)
    return _project_l1(vectors, eps)


def _project_l1(vectors: Tensor, eps: Tensor) -> Tensor:
    """sign(v) max(|v| - theta, 0), theta >= 0 such that the result's l_1 norm is eps (theta = 0 if v is inside).

    With |v| sorted downwards, theta is the mean of what the first k exceed eps by, for the last k for which the k-th
    magnitude is above it.
    """
    magnitudes = vectors.abs()
    ordered = magnitudes.sort(dim=-1, descending=True).values
    counts = torch.arange(1, vectors.shape[-1] + 1, device=vectors.device, dtype=vectors.dtype)
    thetas = (ordered.cumsum(dim=-1) - eps) / counts
    last = (ordered > thetas).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    theta = thetas.gather(-1, last).clamp(min=0.0)
    return vectors.sign() * (magnitudes - theta).clamp(min=0.0)


def steepest(gradient: Tensor, norm: float) -> Tensor:
    """The direction of ||.||_p = 1 along which a function of this gradient grows fastest; 0 where the gradient is.

    For p = 1 that is one coordinate: the one with the largest derivative.
    """
    if norm == INF:
        return gradient.sign()
    if norm == 2.0:
        length = lp_norm(gradient, norm)[..., None]
        return gradient / torch.where(length > 0, length, 1.0)
    largest = gradient.abs().argmax(dim=-1, keepdim=True)
    return torch.zeros_like(gradient).scatter(-1, largest, gradient.gather(-1, largest).sign())


def random_in_ball(shape: tuple[int, ...], norm: float, generator: torch.Generator) -> Tensor:
    """Points spread evenly over the unit ball, float64 on the CPU."""
    size = shape[-1]
    if norm == INF:
        return 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0
    radius = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)[..., None] ** (1.0 / size)
    return radius * random_on_sphere(shape, norm, generator)


def random_on_sphere(shape: tuple[int, ...], norm: float, generator: torch.Generator) -> Tensor:
    """Points of ||.||_p = 1, float64 on the CPU: evenly spread for p = 1 and 2, corners of the cube for inf."""
    if norm == INF:
        return 2.0 * torch.randint(0, 2, shape, generator=generator).double() - 1.0
    points = torch.randn(shape, generator=generator, dtype=torch.float64)
    if norm == 1.0:  # exponential magnitudes with random signs
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        points = points.sign() * -torch.log1p(-uniform)
    return points / lp_norm(points, norm)[..., None]
