"""Where the true input may lie: l_p balls around the frames of a sequence, and how coefficients meet them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices.tables import BALLS
from ..graph.sums import apply_rows, block_of
from .balls import floored
from .lp_ball import INF, NORMS, dual_norm


def clip_of(clip: tuple[float, float] | None, dtype: torch.dtype) -> tuple[float, float] | None:
    """A valid range as inputs of a precision have it: 0.1 in float32 is above 0.1, and no reason to be refused."""
    return clip and tuple(float(torch.tensor(end, dtype=dtype)) for end in clip)


class InputSet:
    """Where the true input may lie, as passes ask of it; ``x``, (batch, T, n), is a point of the set.

    A set has ``norm``, ``is_exact``, ``center``, ``half_widths`` if it is a box, ``frame_deviation`` and
    ``total_deviation``; see ``Perturbation``.
    """

    x: Tensor
    norm: float
    stretch: Tensor | None = None  # by element; see ``Perturbation``
    is_symmetric = True  # about its centre
    is_joint = False  # whether frames share a budget: then there is ``joint_deviation``, see ``CutBalls``
    rough = False  # whether what costs much may be bounded a little less tightly, as in a training
    takes_windows = False  # whether there is ``window_deviation``, likewise

    @property
    def uncut(self) -> InputSet:
        """The set itself, or a ball that holds it where it is one cut to a range: for what knows balls alone."""
        return self

    @property
    def is_box(self) -> bool:
        return self.norm == INF

    @property
    def is_round(self) -> bool:
        """Whether balls look the same in any orthonormal coordinates."""
        return self.norm == 2.0

    @property
    def shares_squares(self) -> bool:
        """Whether the squares of all frames' moves add up to those of a budget: see ``BoundPass.lose``."""
        return False

    @property
    def in_ball(self) -> bool:
        """Whether frames lie in l_2 balls that say something: there is ``ball_radius`` then."""
        return self.is_round

    @property
    def norms_weights(self) -> bool:
        """Whether a frame's deviation is its eps times a norm of the coefficients."""
        return False

    def half_widths(self, frame: int) -> Tensor:
        """Half the sides of the frame's box, (batch, n)."""
        raise NotImplementedError

    def frame_deviation(self, frame: int, coefficients: Tensor) -> Tensor:
        """Most that A_t x'_t can lie below A_t center_t, (batch, rows), for A_t (batch or 1, rows, n)."""
        raise NotImplementedError

    def frame_reach(self, frame: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Most that W x'_t can fall below and rise above W center_t, (batch, size) each, for W (size, n).

        Of sets that look the same from their centre in both directions they are one tensor.
        """
        down = self.frame_deviation(frame, weight[None])
        return down, down if self.is_symmetric else self.frame_deviation(frame, -weight[None])

    def map_reach(
        self,
        frame: int,
        apply: Callable[[Tensor], Tensor],
        absolute: Callable[[Tensor], Tensor],
        norms: Callable[[float], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``frame_reach`` by a W without a matrix: ``apply`` gives W times vectors; see ``map_deviation``."""
        return (self.map_deviation(frame, absolute, norms),) * 2

    def map_deviation(
        self,
        frame: int,
        absolute: Callable[[Tensor], Tensor],
        norms: Callable[[float], Tensor],
        samples: Tensor | slice = slice(None),
    ) -> Tensor:
        """Most that elements of W x'_t can deviate from those of W center_t, (batch, size), by a W without a matrix.

        ``absolute`` gives |W| times vectors, ``norms`` the dual l_p norms of the rows, (size,). Where rows are those of
        some samples each, ``samples`` are their numbers, and both give a number a row.
        """
        return absolute(self.half_widths(frame))

    # --- for squares of linear functions: ``utils.bounds.curve`` ---

    def box(self, frames: list[int], squares: Tensor) -> tuple[Tensor, Tensor]:
        """Scales s, (batch, n), and half-widths of the box of delta_j / s_j over some frames.

        They depend on how much coordinates matter, by their ``squares`` of coefficients; others would be sound too.
        """
        sides = torch.cat([self.half_widths(frame) for frame in frames], dim=-1)
        root = floored(squares).sqrt()
        return (sides / root).sqrt(), (sides * root).sqrt()

    def most_of_squares(self, frames: list[int], weights: Tensor, jacobian: Tensor) -> Tensor | None:
        """A bound of  max over the set of  sum_k w_k (J_k delta)^2,  (batch, rows), where vertices give a good one.

        None where they do not. Weights are (batch, rows, size), J is (batch, size, n).
        """
        return None


@dataclass
class Perturbation(InputSet):
    """The set of sequences x' that a bound has to hold for.

    Attributes:
        x: the sequences, (batch, T, n), in the model's own input units.
        eps: radius of each frame's ball, (batch, T), same units; 0 where a frame is exact.
        norm: p, one of 1, 2 and inf.
        ball: a key of ``BALLS``. "frame": every frame has its own ball, ||x'_t - x_t||_p <= eps[:, t]; "sequence": one
            ball around the whole sequence, ||x' - x||_p <= eps, over the frames whose eps is not 0.
        clip: (lowest, highest) valid input value, to which l_inf boxes are cut, or None.
        stretch: by which every element's move is larger than that of a ball, (batch, T, n), at least 0; None for 1. The
            moves x' - x are those of balls, element by element times this.
        above: for p = inf, that of moves upwards, where ``stretch`` is that of moves downwards; None if both are alike.
    """

    x: Tensor
    eps: Tensor
    norm: float = 2.0
    ball: str = "frame"
    clip: tuple[float, float] | None = None
    stretch: Tensor | None = None
    above: Tensor | None = None

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"p must be 1, 2 or inf, not {self.norm}")
        if self.clip is not None and self.norm != INF:
            raise ValueError("balls that are cut to a range, but for boxes, are CutBalls")
        self._ball = BALLS[self.ball]
        self._check_shapes()
        stretched = self.stretch is not None
        self._box = self._uneven_box() if self.clip is not None or (stretched and self.norm == INF) else None
        reach = self.eps * self._largest_stretch.amax(dim=-1) if stretched else self.eps
        self._exact = (reach == 0).all(dim=0).tolist()

    def _check_shapes(self) -> None:
        if self.x.dim() != 3 or self.eps.shape != self.x.shape[:2]:
            shapes = f"{tuple(self.x.shape)} and {tuple(self.eps.shape)}"
            raise ValueError(f"x must be (batch, T, n) and eps (batch, T), not {shapes}")
        if not bool(((self.eps >= 0) & self.eps.isfinite()).all()):
            raise ValueError("eps must be a finite number >= 0 for every frame")
        self._ball.check(self.eps)

    def _uneven_box(self) -> tuple[Tensor, Tensor]:
        """Centre and half-width, (batch, T, n) each, of boxes cut to the valid range (which must hold x itself).

        Exact frames and elements, such as padding, stay as they are, wherever they lie.
        """
        down = self.eps[..., None] if self.stretch is None else self.eps[..., None] * self.stretch
        up = down if self.above is None else self.eps[..., None] * self.above
        low, high = (-math.inf, math.inf) if self.clip is None else self.clip
        moved = torch.maximum(down, up) > 0
        if bool((((self.x < low) | (self.x > high)) & moved).any()):
            raise ValueError(f"inputs lie outside the range [{low}, {high}] that they are to be clipped to")
        below = torch.where(moved, (self.x - down).clamp(min=low), self.x)
        above = torch.where(moved, (self.x + up).clamp(max=high), self.x)
        center = 0.5 * (below + above)
        return center, torch.maximum(above - center, center - below)  # both ends inside, however the centre was rounded

    def of_first(self, samples: int) -> Perturbation:
        """The part of the first samples of the batch."""
        part = copy.copy(self)
        part.x, part.eps = self.x[:samples], self.eps[:samples]
        part.stretch = None if self.stretch is None else self.stretch[:samples]
        part.above = None if self.above is None else self.above[:samples]
        part._box = None if self._box is None else tuple(side[:samples] for side in self._box)
        return part

    def repeated(self, times: int) -> Perturbation:
        """The set of a batch in which every sample stands ``times`` times in a row."""
        part = copy.copy(self)
        part.x, part.eps = (tensor.repeat_interleave(times, dim=0) for tensor in (self.x, self.eps))
        if self._box is not None:
            part._box = tuple(side.repeat_interleave(times, dim=0) for side in self._box)
        if self.stretch is not None:
            part.stretch = self.stretch.repeat_interleave(times, dim=0)
        if self.above is not None:
            part.above = self.above.repeat_interleave(times, dim=0)
        return part

    @property
    def _largest_stretch(self) -> Tensor:
        return self.stretch if self.above is None else torch.maximum(self.stretch, self.above)

    @property
    def is_round(self) -> bool:
        return self.norm == 2.0 and self.stretch is None

    @property
    def shares_squares(self) -> bool:
        return self.norm <= 2.0 and self._ball is BALLS["sequence"]

    def ball_radius(self, frame: int) -> Tensor:
        """Radius of an l_2 ball around the frame's centre that holds all of it, (batch,); see ``in_ball``."""
        return self.eps[:, frame]

    def _stretched(self, frame: int, coefficients: Tensor) -> Tensor:
        """Coefficients of the ball's own moves, from those of the moves of x: (batch or 1, ..., n)."""
        if self.stretch is None:
            return coefficients
        factor = self.stretch[:, frame]
        return coefficients * (factor if coefficients.dim() == 2 else factor[:, None])

    def _farthest(self, frame: int) -> Tensor:
        """eps times the greatest factor of the frame, (batch,)."""
        eps = self.eps[:, frame]
        return eps if self.stretch is None else eps * self._largest_stretch[:, frame].amax(dim=-1)

    @property
    def scales(self) -> bool:
        """Whether the set at a share of every eps is that share of the set, about x: boxes cut to a range are not."""
        return self.clip is None

    def is_exact(self, frame: int) -> bool:
        """True where no sample of the batch perturbs the frame."""
        return self._exact[frame]

    def center(self, frame: int) -> Tensor:
        """Centre of the frame's ball or cut box, (batch, n)."""
        return self.x[:, frame] if self._box is None else self._box[0][:, frame]

    def half_widths(self, frame: int) -> Tensor:
        """Half the sides of the frame's l_inf box, cut or not, (batch, n)."""
        if self._box is not None:
            return self._box[1][:, frame]
        return self._stretched(frame, self.eps[:, frame, None].expand_as(self.x[:, frame]))

    @property
    def norms_weights(self) -> bool:
        return self._box is None and self.stretch is None

    def frame_deviation(self, frame: int, coefficients: Tensor) -> Tensor:
        """Most that A_t x'_t can deviate from A_t center_t, (batch, rows), for A_t (batch or 1, rows, n).

        For a ball around the sequence that is the deviation if the frame has the ball to itself.
        """
        if self._box is not None:
            return apply_rows(coefficients.abs(), self._box[1][:, frame])
        coefficients = self._stretched(frame, coefficients)
        parts = coefficients.split(block_of(coefficients.shape[-1]), dim=-1)
        sizes = [dual_norm(part, self.norm) for part in parts]
        size = sizes[0] if len(parts) == 1 else dual_norm(torch.stack(sizes, dim=-1), self.norm)
        return self.eps[:, frame, None] * size

    def map_deviation(
        self,
        frame: int,
        absolute: Callable[[Tensor], Tensor],
        norms: Callable[[float], Tensor],
        samples: Tensor | slice = slice(None),
    ) -> Tensor:
        if self._box is not None:
            return absolute(self._box[1][:, frame])
        eps = self._farthest(frame)[samples]
        by_norms = (eps[:, None] if isinstance(samples, slice) else eps) * norms(self.norm)
        if self.stretch is None:
            return by_norms
        return torch.minimum(by_norms, absolute(self.half_widths(frame)))  # a ball lies in its box

    # --- for gradients: ``utils.jacobian`` ---

    def sides(self, frame: int) -> tuple[Tensor, Tensor]:
        """How far below and above x the frame's box reaches, (batch, n) each, at least 0."""
        side, at = self._stretched(frame, self.eps[:, frame, None].expand_as(self.x[:, frame])), self.x[:, frame]
        up = side if self.above is None else self.eps[:, frame, None] * self.above[:, frame]
        if self.clip is None:
            return side, up
        low, high = self.clip
        down, up = torch.minimum(side, at - low), torch.minimum(up, high - at)
        return down.clamp(min=0.0), up.clamp(min=0.0)

    def frame_fall(self, frame: int, low: Tensor, high: Tensor) -> Tensor:
        """Most that -J (x'_t - x_t) can be for J in [low, high], (batch, n) each, if one frame moves, (batch,)."""
        if self._box is None:
            size = dual_norm(self._stretched(frame, torch.maximum(-low, high)), self.norm)
            return torch.where(self.eps[:, frame] > 0, self.eps[:, frame] * size, 0.0)
        down, up = self.sides(frame)
        return torch.maximum(-low * up, high * down).sum(dim=-1)

    def most(self, frame: int, size: Tensor) -> Tensor:
        """Most that J (x'_t - x_t) can be for gradients J of dual norm ``size``, (batch,)."""
        eps = self._farthest(frame)
        return torch.where(eps > 0, eps * size, 0.0)  # however large it is

    def total_deviation(self, deviations: list[Tensor]) -> Tensor:
        """Most that sum_t A_t x'_t can deviate, (batch, rows), from the deviations of the frames."""
        return self._ball.total(torch.stack(torch.broadcast_tensors(*deviations), dim=-1), self.norm)

    def linear_deviation(self, gradients: Tensor) -> Tensor:
        """Most that sum_t g_t x'_t can deviate, (batch,), for g of the shape of x: as if no range were valid."""
        gradients = gradients if self.stretch is None else gradients * self._largest_stretch
        return self._ball.total(self.eps * dual_norm(gradients, self.norm), self.norm)

    def ellipsoid(self, frames: list[int], squares: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
        """``Ball.ellipsoid`` for some frames of such widths."""
        eps = torch.stack([self.eps[:, frame] for frame in frames], dim=-1)
        if self.stretch is None:
            return self._ball.ellipsoid(eps, squares, widths)
        factors = torch.cat([self.stretch[:, frame] for frame in frames], dim=-1)
        scales, size = self._ball.ellipsoid(eps, squares * factors**2, widths)
        return scales * factors, size

    def squared_radius(self, frames: list[int]) -> Tensor:
        """Most that the squares of all deviations of some frames add up to, (batch,), over l_1 and l_2 balls."""
        widths = [self.x.shape[2]] * len(frames)
        scales, size = self.ellipsoid(frames, self.x.new_ones(len(self.x), sum(widths)), widths)
        return size * scales.amax(dim=-1) ** 2

    def most_of_squares(self, frames: list[int], weights: Tensor, jacobian: Tensor) -> Tensor | None:
        """Over l_1 balls a convex function's maximum is at a vertex of each, and roots of frames add up."""
        if self.norm != 1.0:
            return None
        roots = []
        for frame, part in zip(frames, jacobian.split(jacobian.shape[-1] // len(frames), dim=-1), strict=True):
            squares = (weights @ self._stretched(frame, part) ** 2).amax(dim=-1)
            # The root has no gradient at 0.
            root = torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
            roots.append(self.eps[:, frame, None] * root)
        return sum(roots) ** 2
