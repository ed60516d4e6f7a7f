"""Spectrograms of utterances, under the level of noise that each chunk by itself is certified to stand."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from data.speech import Utterance

from ..network.speech import MelFeatures

FIGURE = "spectrograms.png"


def plot_spectrograms(drawn: Sequence[tuple[Utterance, Tensor, Tensor]], features: MelFeatures) -> Figure:
    """A panel an utterance: mel energies over time, and a line of the chunks' certified levels; low is sensitive.

    ``drawn`` holds the utterance, its features (C - 1, bands) and the levels (C,) in dB of the peak.
    """
    figure = Figure(figsize=(7.2, 2.3 * len(drawn) + 0.5), layout="constrained")
    figure.suptitle(
        "Red: noise that a chunk by itself is certified to stand, low: sensitive. Grey: loudness", fontsize=10
    )
    step = features.hop / features.rate
    for axes, (one, values, levels) in zip(figure.subplots(len(drawn), 1, squeeze=False).flat, drawn, strict=True):
        ends = (0.5 * step, (len(values) + 0.5) * step, 0.5, features.bands + 0.5)
        axes.imshow(values.T.cpu().numpy(), origin="lower", aspect="auto", extent=ends, cmap="Greys")
        axes.set(xlabel="seconds", ylabel="mel band", xlim=(0.0, len(levels) * step))
        axes.set_title(f"{one.name}, digit {one.label}", fontsize=9)
        right = axes.twinx()
        middles = [(t + 0.5) * step for t in range(len(levels))]
        right.step(middles, levels.cpu().tolist(), where="mid", color="tab:red")
        right.set_ylabel("certified, dB of the peak", color="tab:red")
    return figure
