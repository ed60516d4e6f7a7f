"""Threat models of speech: levels in decibels and radii in samples, and the network that is asked about."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import SequenceClassifier
from .features import SpeechClassifier

LOUDEST = 300.0  # dB of the peak, either way: about what numbers can tell apart


@dataclass(frozen=True)
class SpeechThreat:
    """What may be done to utterances whose peak is 1.

    Attributes:
        kind: "noise": |d_j| <= 10^(level / 20) for every sample; "snr": |d|_2 <= |x|_2 10^(-level / 20), in all;
            "features": every feature, a logarithm, moves by at most ``level``.
        span: seconds between which chunks move, or None for all.
    """

    kind: str
    level: float
    span: tuple[float, float] | None = None

    def __post_init__(self):
        least = 0.0 if self.kind == "features" else -LOUDEST
        if not least <= self.level <= LOUDEST:
            raise ValueError(f"levels must be from {least:g} to {LOUDEST:g} for {self.kind}, not {self.level}")

    def model(self, classifier: SpeechClassifier) -> nn.Module:
        """The network whose input moves."""
        if self.kind != "features":
            return classifier
        parts = {"pooling": classifier.pooling, "mean": classifier.mean, "std": classifier.std}
        return SequenceClassifier(classifier.rnn, classifier.head, **parts)

    def inputs(self, classifier: SpeechClassifier, x: Tensor) -> Tensor:
        """What moves, of chunks (batch, C, hop)."""
        return classifier.features(x) if self.kind == "features" else x

    def settings(self, classifier: SpeechClassifier, frames: int) -> dict[str, object]:
        """Keyword arguments of ``certified_margin`` and of attacks. Raises ValueError if the span holds nothing."""
        settings: dict[str, object] = {"norm": 2.0, "ball": "sequence"} if self.kind == "snr" else {"norm": math.inf}
        if self.span is not None:
            settings["frames"] = self.moved(frames, classifier.features.hop / classifier.features.rate)
        return settings

    def moved(self, frames: int, step: float) -> Tensor:
        """Which frames, ``step`` seconds apart, meet the span, (frames,) of bool. Raises ValueError if none does."""
        starts = torch.arange(frames) * step
        found = (starts + step > self.span[0]) & (starts < self.span[1])
        if not bool(found.any()):
            raise ValueError(f"no chunk lies between {self.span[0]:g} and {self.span[1]:g} seconds")
        return found

    @property
    def share(self) -> float:
        """The level as a share of the peak (noise) or of the utterance's l_2 norm (snr), or in nats (features)."""
        if self.kind == "features":
            return self.level
        return 10.0 ** ((-self.level if self.kind == "snr" else self.level) / 20.0)

    def eps(self, x: Tensor) -> Tensor:
        """Radii of chunks (batch, C, hop), (batch,)."""
        sizes = x.flatten(1).norm(dim=1) if self.kind == "snr" else torch.ones_like(x[:, 0, 0])
        return sizes * self.share

    def level_of(self, eps: Tensor, x: Tensor) -> Tensor:
        """Inverse of ``eps``: dB of the peak, dB of signal to noise, or nats, (batch,)."""
        if self.kind == "features":
            return eps
        if self.kind == "noise":
            return 20.0 * eps.log10()
        return 20.0 * (x.flatten(1).norm(dim=1) / eps).log10()
