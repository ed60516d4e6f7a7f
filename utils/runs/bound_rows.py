"""The rows of a bound script's results: a radius for every image, or for every frame of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .rows import KeyedRow, read_rows


@dataclass(frozen=True)
class Key:
    """What a row is about.

    Attributes:
        index: number of the image in the test set, from 0.
        label: its true class.
        prediction: the class that the model gives it (the label: other images are not bounded).
        target: the class whose logit must stay below the label's, or "all" for every other class.
        frame: the only frame that is perturbed, from 0; None (no column) if the run has one radius a sample.
    """

    index: int
    label: int
    prediction: int
    target: int | str
    frame: int | None = None


@dataclass(frozen=True)
class Row(Key, KeyedRow):
    """A key with what was found for it; eps and radius are in the units of the model's input (pixel values).

    Attributes:
        radius: the largest eps that was certified; 0 if none was.
        failed_eps: the smallest eps that was not certified; inf if every perturbation of a valid image was, or time was
            up before one was met.
        margin: lower bound of the worst margin (label's logit less another's) at radius, less the slack for rounding.
        evaluations: bounds computed for the row.
        seconds: wall time of the row's batch, divided by the number of samples in it.
        start_radius: of tuned methods, the radius of the method that they start from; NaN where it was not noted.
        attack_radius: size of the smallest perturbation that an attack found; inf if it found none, NaN without one.
    """

    KEY: ClassVar[type] = Key

    radius: float = 0.0
    failed_eps: float = math.inf
    margin: float = 0.0
    evaluations: int = 0
    seconds: float = 0.0
    start_radius: float | None = math.nan
    attack_radius: float | None = math.nan


def read_bound_rows(path: Path) -> list[Row]:
    """The complete rows of a bound script's CSV file (``utils.runs.rows.read_rows``)."""
    return read_rows(path, Row)[0]


def statistics(values: Sequence[float]) -> dict[str, float]:
    """min, mean, max and std (of the values themselves, divided by their number) of at least one value."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return {"min": min(values), "mean": mean, "max": max(values), "std": math.sqrt(variance)}


def summarize(rows: Sequence[Row], counted: Sequence[int] = ()) -> dict[str, Any]:
    """Statistics of the radii, in input units, over all rows and, if there are frames, for each of them.

    Where radii count changes, also how many rows are certified at each of the ``counted`` numbers.
    """
    radii = [row.radius for row in rows]
    samples = len({row.index for row in rows})
    summary: dict[str, Any] = statistics(radii) | {
        "samples": samples,
        "not_certified": sum(radius == 0 for radius in radii),
        "evaluations_per_row": sum(row.evaluations for row in rows) / len(rows),
        "seconds_per_sample": math.fsum(row.seconds for row in rows) / samples,
    }
    if counted:
        numbers = {str(number): sum(radius >= number for radius in radii) for number in sorted(set(counted))}
        summary |= {"rows": len(rows), "at_changes": numbers}
    started = [row for row in rows if row.start_radius > 0]  # False for NaN
    if started:
        start = math.fsum(row.start_radius for row in started)
        summary["gain"] = {
            "rows": len(started),
            "in_vain": sum(row.radius <= row.start_radius for row in started),
            "mean": math.fsum(row.radius for row in started) / start - 1.0,
        }
    attacked = [row.attack_radius for row in rows if math.isfinite(row.attack_radius)]
    if attacked:
        summary["attack"] = statistics(attacked) | {"samples": len(attacked)}
    frames = sorted({row.frame for row in rows if row.frame is not None})
    if frames:
        summary["frames"] = [
            {"frame": frame} | statistics([row.radius for row in rows if row.frame == frame]) for frame in frames
        ]
    return summary
