"""Log mel energies as the first layers of a recurrent classifier, which therefore reads waveforms.

A waveform is a sequence of chunks of ``hop`` samples. A window spans two chunks, so windows overlap by half, and every
sample is in one chunk alone: a ball of samples is a ball of chunks, and a span of time some of them. Of a window v

    E_m  =  sum_k M_mk ((c_k . v)^2 + (s_k . v)^2),        f_m  =  log(1 + E_m / floor),

with the cosines and sines c_k, s_k of the discrete Fourier transform, under a Hann window, and triangles M in the mel
scale, scaled so that white noise of variance 1 has a mean energy of 1 in every band. log(1 + E / floor) is
log(E + floor) but for a constant, which the normalisation takes off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...graph.graph import Graph
from ...graph.nodes import Linear, Node
from ...graph.nonlinear import Activation
from ...graph.power import BandPower, Square
from ..models import SequenceClassifier

RATE = 8000
LOWEST_HERTZ = 60.0
POWERS = ("bands", "squares")  # how the graph bounds energies


class MelFeatures(nn.Module):
    """Features (batch, C - 1, bands) of chunks (batch, C, hop).

    Args:
        hop: samples of a chunk, half a window.
        bands: mel bands between 60 Hz and half the rate.
        floor: energy that is added before the logarithm, in units of white noise of variance 1.
        rate: samples a second.
    """

    def __init__(self, hop: int = 200, bands: int = 20, floor: float = 1e-4, rate: int = RATE):
        super().__init__()
        self.hop, self.bands, self.floor, self.rate = hop, bands, float(floor), rate
        with torch.device("cpu"):  # even where others are only to have a shape
            weights = mel_weights(2 * hop, bands, rate)
            used = weights.sum(dim=0) > 0
            wave = fourier_rows(2 * hop, used.nonzero().squeeze(-1))
            weights = weights[:, used]
            weights = weights / (weights @ (wave**2).sum(dim=-1).unflatten(0, (2, -1)).sum(dim=0))[:, None]
        self.register_buffer("wave", wave, persistent=False)  # cosines, then sines: (2 bins, 2 hop)
        self.register_buffer("mel", weights, persistent=False)  # (bands, bins)

    def energies(self, x: Tensor) -> Tensor:
        """E, (batch, C - 1, bands)."""
        windows = torch.cat((x[:, :-1], x[:, 1:]), dim=-1)
        squares = (windows @ self.wave.T) ** 2
        cosines, sines = squares.chunk(2, dim=-1)
        return (cosines + sines) @ self.mel.T

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(self.energies(x) / self.floor)


def check_features(features: dict, bands: int) -> None:
    """Raise ValueError if these are not the arguments of ``MelFeatures`` of so many bands."""
    numbers = {"hop": int, "bands": int, "floor": float, "rate": int}
    if not isinstance(features, dict) or set(features) != set(numbers):
        raise ValueError(f"features in the config must have {', '.join(numbers)}, not {features!r}")
    if any(type(features[name]) is not kind or not 0 < features[name] < math.inf for name, kind in numbers.items()):
        raise ValueError(f"features in the config must be positive numbers, not {features!r}")
    if features["bands"] != bands:
        raise ValueError(f"features in the config have {features['bands']} bands, input_size is {bands}")
    with torch.device("cpu"):
        mel_weights(2 * features["hop"], features["bands"], features["rate"])


def mel_weights(size: int, bands: int, rate: int) -> Tensor:
    """Triangles of equal width in the mel scale over the frequencies of a transform, (bands, size / 2 + 1) float64."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    knots = torch.linspace(mel(LOWEST_HERTZ), mel(rate / 2), bands + 2, dtype=torch.float64)
    places = torch.tensor([mel(k * rate / size) for k in range(size // 2 + 1)], dtype=torch.float64)
    rising = (places - knots[:-2, None]) / (knots[1:-1] - knots[:-2])[:, None]
    falling = (knots[2:, None] - places) / (knots[2:] - knots[1:-1])[:, None]
    weights = torch.minimum(rising, falling).clamp(min=0.0)
    if bool((weights.sum(dim=1) == 0).any()):
        raise ValueError(f"{bands} mel bands are too many for windows of {size} samples: some have no frequency")
    return weights


def fourier_rows(size: int, bins: Tensor) -> Tensor:
    """Rows of cosines, then of sines, times a Hann window, (2 bins, size) float64."""
    angle = 2.0 * math.pi * bins[:, None].double() * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.cat((angle.cos(), angle.sin())) * hann(size)


def hann(size: int) -> Tensor:
    """The Hann window between samples, (size,) float64: nowhere 0."""
    return torch.sin(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size) ** 2


class SpeechClassifier(SequenceClassifier):
    """Logits of waveforms in chunks, (batch, C, hop): ``features``, normalised, through a recurrent classifier.

    ``power`` says how graphs bound energies: "bands" takes each as a quadratic form of its window, "squares" the square
    of each cosine and sine by itself.
    """

    def __init__(self, features: MelFeatures, rnn: nn.RNNBase, head: nn.Linear, power: str = "bands", **arguments):
        super().__init__(rnn, head, **arguments)
        if rnn.input_size != features.bands:
            raise ValueError(f"there are {features.bands} features, the recurrent layer takes {rnn.input_size}")
        if power not in POWERS:
            raise ValueError(f"power must be one of {', '.join(POWERS)}, not {power!r}")
        self.features, self.power = features.to(head.weight.dtype), power

    is_bare = False

    @property
    def input_size(self) -> int:
        return self.features.hop

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits, (batch, classes), of chunks; those at and after ``lengths`` (batch,) do not count."""
        return super().forward(self.features(x), None if lengths is None else lengths - 1)

    def enter(
        self, graph: Graph, frames: list[tuple[Node, ...]], lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[list[tuple[Node, ...]], Tensor | None]:
        """Features as nodes over the chunks' frames, and how many there are of each sample."""
        wave, mel = self.features.wave.to(dtype), self.features.mel.to(dtype) / self.features.floor
        both = torch.cat((mel, mel), dim=1)
        zeros = [wave.new_zeros(size) for size in (wave.shape[0], mel.shape[0])]
        window = hann(2 * self.features.hop).to(wave)
        parts = wave.split(self.features.hop, dim=1)
        shared: dict = {}  # what windows have in common
        made = []
        for (first,), (second,) in zip(frames[:-1], frames[1:], strict=True):
            if self.power == "bands":
                energy = graph.add(BandPower((first, second), wave, both, window, shared))
            else:
                turned = graph.add(Linear((first, second), parts, zeros[0]))
                energy = graph.add(Linear((graph.add(Square(turned)),), (both,), zeros[1]))
            made.append((graph.add(Activation(energy, "log1p")),))
        return made, None if lengths is None else lengths - 1
