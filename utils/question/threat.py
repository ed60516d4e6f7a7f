"""Threat models: what may be done to a batch of sequences, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..choices.tables import BALLS
from ..perturbation.changes import Changes
from ..perturbation.cut_balls import CutBalls
from ..perturbation.lp_ball import INF
from ..perturbation.moves import FrameBalls
from ..perturbation.sets import Perturbation, clip_of
from .arguments import as_clip, as_norm, as_tensor, check_names
from .elements import box_sides, element_scales, group_numbers

Frames = int | Sequence[int] | Tensor | None


def frame_mask(frames: Frames, batch: int, num_frames: int) -> Tensor:
    """Which frames are perturbed, (batch, T) of bool: None for all, a frame, a list of frames, or a mask.

    Raises:
        ValueError: there is no such frame, or a mask has another shape.
    """
    if frames is None:
        return torch.ones(batch, num_frames, dtype=torch.bool)
    frames = as_tensor(frames, "frames", "a frame's number, a list of these or a mask of bool")
    if frames.dtype == torch.bool:
        if frames.shape not in ((num_frames,), (batch, num_frames)):
            raise ValueError(f"a frame mask is (T,) or (batch, T) = {(batch, num_frames)}, not {tuple(frames.shape)}")
        return frames.expand(batch, num_frames).clone()
    chosen = frames.reshape(-1).tolist()
    if not chosen or frames.is_floating_point() or any(not 0 <= frame < num_frames for frame in chosen):
        raise ValueError(f"frames must be from 0 ... {num_frames - 1}, not {chosen}")
    mask = torch.zeros(batch, num_frames, dtype=torch.bool)
    mask[:, chosen] = True
    return mask


@dataclass(frozen=True)
class Threat:
    """What may be done to sequences; see ``utils.certify.certified_margin``.

    Attributes:
        norm: p of the l_p balls: 1, 2 or inf; or 0: at most eps values change, to anything in the range ``clip``.
        ball: a key of ``utils.choices.BALLS``.
        frames: which frames are perturbed; once the threat is ``to`` a batch, a mask, (batch, T) of bool.
        clip: valid input range (lowest, highest), or None.
        lengths: (batch,) number of frames that count in each sample; None for all.
        features: which elements are perturbed: numbers of a frame's elements, or a mask of bool; None for all.
        scales: by which every element's move is larger, at least 0; None for 1. Both may be (n,), (T, n) or
            (batch, T, n), or have the shape of the input. Once ``to`` a batch, scales are (batch, T, n) and hold both.
        together: for p = 0, what changes together and counts as one: "pixel", "frame", or numbers of groups; None for
            single values. Once ``to`` a batch, numbers of groups, (T, n).
        box: (lower, upper), for p = inf: ends that values have at eps = 1; x need not be in the middle. Each may be as
            scales may. Once ``to`` a batch, how much larger moves upwards are, (batch, T, n), scales being those down.
    """

    norm: float = 2.0
    ball: str = "frame"
    frames: Frames = None
    clip: tuple[float, float] | None = None
    lengths: Tensor | None = None
    features: Any = None
    scales: Any = None
    together: Any = None
    box: Any = None

    def __post_init__(self):
        for name, value in (("norm", as_norm(self.norm)), ("clip", as_clip(self.clip))):
            object.__setattr__(self, name, value)
        BALLS.check(self.ball)
        if self.norm == 0.0:
            self._check_counts()
        elif self.together is not None:
            raise ValueError("together is for p = 0, which counts what changes: leave it out")
        if self.box is not None and (self.norm != INF or self.ball != "frame"):
            raise ValueError("box is for norm = inf and the ball of every frame")

    def _check_counts(self) -> None:
        if self.clip is None:
            raise ValueError("p = 0 lets values change to anything in a range: give clip, (lowest, highest)")
        if isinstance(self.together, str) and self.together == "frame" and self.ball != "sequence":
            raise ValueError("frames that change as a whole are counted over the sequence: take ball='sequence'")

    def to(self, x: Tensor, shape: Sequence[int] | None = None) -> Threat:
        """The threat to the batch x, (batch, T, n), with a mask of frames. Raises ValueError if it does not fit.

        ``shape`` is that of one input before it was taken as frames.
        """
        mask = frame_mask(self.frames, *x.shape[:2]).to(x.device)
        lengths = None if self.lengths is None else self.lengths.to(x.device)
        if lengths is not None:
            mask &= torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        clip = clip_of(self.clip, x.dtype)
        scales, above = element_scales(self.features, self.scales, x), None
        if self.box is not None:
            if scales is not None or clip is not None:
                raise ValueError("box says how far every value goes: leave out scales, features and clip")
            scales, above = box_sides(self.box, x)
        if self.norm == 0.0 and scales is not None and bool(((scales != 0) & (scales != 1)).any()):
            raise ValueError("p = 0 counts what changes, by however much: leave out scales, features say what may")
        numbers = group_numbers(self.together, x, shape)
        fitted = {"frames": mask, "clip": clip, "lengths": lengths, "features": None, "scales": scales}
        return replace(self, **fitted, together=numbers, box=above)

    def check_even(self, what: str) -> None:
        """Raise ValueError if elements have scales of their own; ``what`` asks for it."""
        if self.scales is not None:
            raise ValueError(f"{what} are of balls in which all elements count alike: leave out features and scales")

    def part(self, samples: Tensor | slice) -> Threat:
        """The threat to some samples of its batch."""
        lengths = None if self.lengths is None else self.lengths[samples]
        scales = None if self.scales is None else self.scales[samples]
        box = None if self.box is None else self.box[samples]
        return replace(self, frames=self.frames[samples], lengths=lengths, scales=scales, box=box)

    def around(self, x: Tensor, eps: Tensor) -> Perturbation:
        """The set for bounds, of size eps, (batch,) or (batch, T), around the batch x, (batch, T, n)."""
        eps = (eps[:, None] if eps.dim() == 1 else eps).to(x.dtype) * self.frames
        told = (x, eps, self.norm, self.ball, self.clip, None if self.scales is None else self.scales.to(x))
        cut = self.clip is not None and self.norm != INF
        if cut:
            return CutBalls(*told, together=self.together)
        return Perturbation(*told, None if self.box is None else self.box.to(x))

    def moves(self, x: Tensor) -> FrameBalls:
        """The set for attacks, of any size, around the batch x, (batch, T, n)."""
        told = (x, self.frames, self.norm, self.ball, self.clip, None if self.scales is None else self.scales.to(x))
        if self.norm == 0.0:
            return Changes(*told, together=self.together)
        return FrameBalls(*told, None if self.box is None else self.box.to(x))


def threat_of(**arguments: Any) -> Threat:
    """The threat model of keyword arguments. Raises ValueError if there is none of such a name."""
    check_names(arguments, [field.name for field in fields(Threat)])
    return Threat(**arguments)
