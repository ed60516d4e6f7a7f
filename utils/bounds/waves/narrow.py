"""Few coordinates for wide frames whose rows have few directions: bands of energies read 400 samples in 20 ways.

Rows A of a pass meet a frame's deviation d, (n,), by combinations of the slopes S of the nodes that read the frame.
With an orthonormal basis Q, (n, r), of the rows of S,

    A d  =  A Q y + (A - A Q Q') d,        y = Q' d,   |y|_2 <= |d|_2,

where the last term is what rounding has left. So sums of squares of rows are bounded in the few coordinates y, which
lie in the l_2 ball that holds the frame's own set: for l_2 balls nothing is lost, for boxes |d|_2 <= |half-widths|_2.
That gives up little where samples matter alike, as then the ellipsoid that a box is bounded by is a ball in them. What
is left is handed out as well, to be bounded apart: any Q is sound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...graph.nodes import Frame
from ...graph.power import BandPower
from ...perturbation.balls import FRAME

if TYPE_CHECKING:
    from ..passes import BoundPass

SHARE = 0.5  # of a frame's size that the directions may be, to be worth it


class Narrow:
    """Bases of the perturbed frames of a pass."""

    def __init__(self, bounds: BoundPass, frames: list[Frame]):
        self.frames = frames
        with torch.no_grad():
            read = {frame: [node for node in bounds.graph.nodes if frame in node.parents] for frame in frames}
            self.bases = [
                torch.linalg.qr(torch.cat([node.slopes_at(frame, bounds) for node in read[frame]], dim=1).mT)[0]
                for frame in frames
            ]
        self.widths = [basis.shape[-1] for basis in self.bases]

    @staticmethod
    def fit(bounds: BoundPass, frames: list[Frame]) -> bool:
        """Whether the frames are read by few bands alone, and their sets lie in l_2 balls or boxes."""
        if not frames or not (bounds.perturbation.is_box or bounds.perturbation.is_round):
            return False
        if any(node.samples is not None for node in bounds.graph.nodes):
            return False
        directions = dict.fromkeys(frames, 0)
        for node in bounds.graph.nodes:
            for parent in node.parents:
                if parent in directions:
                    if not isinstance(node, BandPower):
                        return False
                    directions[parent] += node.size
        return all(count <= SHARE * frame.size for frame, count in directions.items())

    def reduced(self, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Coefficients of y, (batch, rows, all widths), of those of d, (batch, rows, n) a frame, and what is left."""
        found = [part @ basis for part, basis in zip(parts, self.bases, strict=True)]
        with torch.no_grad():
            left = [part - y @ basis.mT for part, y, basis in zip(parts, found, self.bases, strict=True)]
        return torch.cat(found, dim=-1), left

    def ellipsoid(self, bounds: BoundPass, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and size of the set of all y, as of ``Ball.ellipsoid``."""
        perturbation, numbers = bounds.perturbation, [frame.frame for frame in self.frames]
        if perturbation.is_box:
            radii = [perturbation.half_widths(number).norm(dim=-1) for number in numbers]
            scales, size = FRAME.ellipsoid(torch.stack(radii, dim=-1), squares, self.widths)
        else:
            scales, size = perturbation.ellipsoid(numbers, squares, self.widths)
        return scales, size * self._stretch

    @property
    def _stretch(self) -> float:
        """|Q' d|^2 / |d|^2 at most: 1, but for rounding."""
        worst = 0.0
        for basis in self.bases:
            gram = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
            worst = max(worst, float(torch.linalg.matrix_norm(gram).amax()))
        return 1.0 + worst + 4.0 * self.bases[0].shape[1] * torch.finfo(self.bases[0].dtype).eps
