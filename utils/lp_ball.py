"""l_p balls as attacks need them: projection, steepest direction, random points, and sets of frames made of them.

All functions work on vectors along the last dimension, for p = 1, 2 and inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.perturbation import BALLS, INF, NORMS, dual_norm


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


@dataclass
class FrameBalls:
    """Where x' may lie: balls around the chosen frames of x (or one around all of them), in the valid input range.

    Attributes:
        x: sequences, (batch, T, n).
        mask: which frames are perturbed, (batch, T) of bool; the others are exact.
        norm: p, one of 1, 2 and inf.
        ball: "frame": ||x'_t - x_t||_p <= eps_t for every frame; "sequence": ||x' - x||_p <= eps over the chosen ones.
        clip: (lowest, highest) valid input value, for any p, or None.

    A *group* is what has a ball to itself: a frame, or the whole sequence. Perturbations are delta = x' - x, (batch, T,
    n) or with more dimensions between the batch and T; radii are eps, (batch, groups) or with the same dimensions.
    """

    x: Tensor
    mask: Tensor
    norm: float = 2.0
    ball: str = "frame"
    clip: tuple[float, float] | None = None

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"p must be 1, 2 or inf, not {self.norm}")
        if self.ball not in BALLS:
            raise ValueError(f"ball must be one of {', '.join(BALLS)}, not {self.ball!r}")
        if self.clip is not None and bool(((self.x < self.clip[0]) | (self.x > self.clip[1])).any()):
            raise ValueError(f"inputs lie outside the range {list(self.clip)} that they are to be clipped to")

    def select(self, rows: Tensor | slice, dtype: torch.dtype) -> FrameBalls:
        """The set of some of the samples, in a precision."""
        return FrameBalls(self.x[rows].to(dtype), self.mask[rows], self.norm, self.ball, self.clip)

    @property
    def groups(self) -> int:
        return self.x.shape[1] if self.ball == "frame" else 1

    def per_group(self, eps: Tensor) -> Tensor:
        """Radii (batch, groups) from one a sample, (batch,), or one a frame, (batch, T); 0 for exact frames."""
        if self.ball == "sequence":
            return (eps if eps.dim() == 1 else eps.amax(dim=1))[:, None]
        return (eps[:, None] if eps.dim() == 1 else eps) * self.mask

    def _between(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor of the samples (batch, a, ...) with the dimensions that ``like`` has between batch and T."""
        return tensor.reshape(tensor.shape[0], *([1] * (like.dim() - 3)), *tensor.shape[1:])

    def group(self, delta: Tensor) -> Tensor:
        """(..., groups, elements) of what is perturbed, zeros elsewhere."""
        delta = delta * self._between(self.mask, delta)[..., None]
        return delta if self.ball == "frame" else delta.flatten(-2)[..., None, :]

    def frames(self, grouped: Tensor) -> Tensor:
        """Back from groups to (..., T, n)."""
        return grouped if self.ball == "frame" else grouped.reshape(*grouped.shape[:-2], *self.x.shape[1:])

    def sizes(self, delta: Tensor) -> Tensor:
        """||.||_p of each group, (..., groups)."""
        return lp_norm(self.group(delta), self.norm)

    def size(self, delta: Tensor) -> Tensor:
        """The largest ||.||_p of a group: the smallest common eps whose set contains delta."""
        return self.sizes(delta).amax(dim=-1)

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """Most that a linear function of this gradient changes per unit of eps of each group, (..., groups)."""
        return dual_norm(self.group(gradient), self.norm)

    def steepest(self, gradient: Tensor, delta: Tensor) -> Tensor:
        """Direction of size 1 in each group along which a function of this gradient grows fastest from delta.

        Elements that the valid range lets go no further are left out: an l_1 step would choose one of them for ever.
        """
        if self.clip is not None:
            x = self._between(self.x, delta) + delta
            gradient = gradient.masked_fill((x >= self.clip[1]) & (gradient > 0), 0.0)
            gradient = gradient.masked_fill((x <= self.clip[0]) & (gradient < 0), 0.0)
        return self.frames(steepest(self.group(gradient), self.norm))

    def scaled(self, delta: Tensor, eps: Tensor) -> Tensor:
        """Each group of delta, (batch or 1, ..., T, n), times its eps, (batch, groups)."""
        return self.frames(self.group(delta.expand(len(eps), *delta.shape[1:])) * self._spread(eps, delta)[..., None])

    def _spread(self, eps: Tensor, delta: Tensor) -> Tensor:
        return eps if eps.dim() == delta.dim() - 1 else self._between(eps[..., None], delta).squeeze(-1)

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        """A near point of the set: the nearest of the balls, then moved towards x into the valid range."""
        return self.clip_range(self.frames(project(self.group(delta), self._spread(eps, delta), self.norm)))

    def clip_range(self, delta: Tensor) -> Tensor:
        """Perturbations cut to the valid range: as x is in it, no element grows, so no ball is left."""
        if self.clip is None:
            return delta
        x = self._between(self.x, delta)
        return (x + delta).clamp(*self.clip) - x

    def random_starts(self, count: int, generator: torch.Generator) -> Tensor:
        """(1, count, T, n) perturbations of eps = 1, the same for all samples: half of them on the boundary."""
        shape = (1, count, self.groups, self.x.shape[1:].numel() // self.groups)
        points = random_on_sphere(shape, self.norm, generator)
        points[:, ::2] = random_in_ball(shape, self.norm, generator)[:, ::2]
        return self.frames(points).to(self.x)
