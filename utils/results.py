"""The folder of a bound run: certified_bound.csv, one row per sample as it is finished, and run.json about the run.

A run is a list of keys, one for every row to come, in order. Rows are appended in that order, batch by batch, so the
file is always a prefix of the whole result: an interrupted run goes on after its last complete row. Several processes
can share a run: each takes some of the keys and a folder of its own; all rows in the order of all keys are the whole.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

CSV_NAME = "certified_bound.csv"
RECORD_NAME = "run.json"
EXAMPLES_NAME = "examples.npz"
FIGURES = ("radius_histogram.png", "certified_fraction.png", "frame_heatmap.png")
# Where things lie and how they are run; everything else must agree when a run is resumed.
FREE_ARGUMENTS = ("work_dir", "data_dir", "resume", "dry_run", "threads", "device", "cuda")

Record = dict[str, Any]


class ResultError(ValueError):
    """A result folder that cannot be read or continued; the message is one line that names it."""


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
class Row(Key):
    """A key with what was found for it; eps and radius are in the units of the model's input (pixel values).

    Attributes:
        radius: the largest eps that was certified; 0 if none was.
        failed_eps: the smallest eps that was not certified; inf if every perturbation of a valid image was.
        margin: lower bound of the worst margin (label's logit less another's) at radius, less the slack for rounding.
        evaluations: bounds computed for the row.
        seconds: wall time of the row's batch, divided by the number of samples in it.
    """

    radius: float = 0.0
    failed_eps: float = math.inf
    margin: float = 0.0
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> Key:
        return Key(self.index, self.label, self.prediction, self.target, self.frame)


COLUMNS = tuple(field.name for field in fields(Row))
INTEGERS = ("index", "label", "prediction", "frame", "evaluations")


def columns(per_frame: bool) -> tuple[str, ...]:
    """Header of the CSV file; the frame column is there only with one radius per frame."""
    return tuple(name for name in COLUMNS if per_frame or name != "frame")


def format_row(row: Row, names: Sequence[str]) -> str:
    """The row as a line of CSV; radii in full precision, so that reading gives back the same number."""
    values = [f"{row.seconds:.6f}" if name == "seconds" else str(getattr(row, name)) for name in names]
    return ",".join(values) + "\n"


def parse_row(values: Sequence[str], names: Sequence[str]) -> Row:
    """Inverse of ``format_row``. Raises ValueError if the values are not those of a row."""
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields instead of {len(names)}")
    parsed: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if name == "target":
            parsed[name] = value if value == "all" else int(value)
        else:
            parsed[name] = int(value) if name in INTEGERS else float(value)
    return Row(**parsed)


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The complete rows of a CSV file and how many bytes, header included, they take.

    A last line without its end, which an interruption can leave, does not count.

    Raises:
        ResultError: the file is no such CSV file or a complete line in it is damaged.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    try:
        lines = content[:size].decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise ResultError(f"{path} is not a result of this project: it is no plain text") from None
    if not lines:
        return [], 0
    names = tuple(lines[0].split(","))
    if names not in (columns(True), columns(False)):
        raise ResultError(f"{path} is not a result of this project: its header is unknown")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(parse_row(line.split(","), names))
        except ValueError as error:
            raise ResultError(f"{path} is damaged in line {number}: {error}") from None
    return rows, size


def read_record(folder: Path) -> Record:
    """run.json of a result folder. Raises ResultError if it is damaged, OSError if it cannot be read."""
    path = folder / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ResultError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
        raise ResultError(f"{path} is not a record of this project")
    return record


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` if the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_record(folder: Path, record: Record) -> None:
    """Write run.json, whole or not at all. NaN and infinities, which JSON does not have, raise ValueError."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with replacing(folder / RECORD_NAME) as path:
        path.write_text(text, encoding="utf-8")


def identity(record: Record) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other, by the name to be shown to the user."""
    arguments = {
        f"--{name.replace('_', '-')}": value
        for name, value in record["arguments"].items()
        if name not in FREE_ARGUMENTS
    }
    facts = {
        "the checkpoint's sha256": record.get("model", {}).get("sha256"),
        "the drawn images' sha256": record.get("data", {}).get("drawn_sha256"),
        "the device": record.get("device"),
    }
    return arguments | facts


class ResultFolder:
    """Writes the results of one run.

    Nothing in the folder changes before the first new rows are written. Earlier results are replaced then, or, if the
    run is resumed, continued.

    Args:
        folder: must exist.
        record: what run.json says about the run.
        keys: what the rows will be about, in order.
        resume: continue what lies in the folder.

    Attributes:
        rows: the rows so far, a prefix of the whole result.

    Raises:
        ResultError: resume was asked for, but what lies there is damaged or belongs to another run.
    """

    def __init__(self, folder: Path, record: Record, keys: Sequence[Key], *, resume: bool = False):
        self.folder, self.record, self.keys = folder, dict(record), list(keys)
        self.names = columns(any(key.frame is not None for key in keys))
        self.csv_path = folder / CSV_NAME
        self.rows: list[Row] = []
        self._size = 0  # bytes to keep of the file that is there
        self._begun = False
        if resume:
            self._find_earlier()

    def _find_earlier(self) -> None:
        if not self.csv_path.exists():
            return
        if not (self.folder / RECORD_NAME).exists():
            raise ResultError(f"cannot resume in {self.folder}: {RECORD_NAME} is missing; leave out --resume")
        earlier = read_record(self.folder)
        then, now = identity(earlier), identity(self.record)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                change = f"{name} was {_shown(then.get(name))}, now it is {_shown(now.get(name))}"
                raise ResultError(f"cannot resume in {self.folder}: {change}; leave out --resume to start again")
        rows, size = read_rows(self.csv_path)
        if [row.key for row in rows] != self.keys[: len(rows)]:
            raise ResultError(f"cannot resume in {self.folder}: its rows are not those of this run")
        self.rows, self._size = rows, size
        if rows and (len(rows) < len(self.keys) or earlier.get("status") != "finished"):
            before = {name: earlier.get(name) for name in ("commit", "versions", "started")}
            self.record["resumed"] = [*earlier.get("resumed", []), {"rows": len(rows), **before}]

    def append(self, rows: Sequence[Row]) -> None:
        """Write the next rows, which must be those of the next keys, and flush them."""
        following = self.keys[len(self.rows) : len(self.rows) + len(rows)]
        if [row.key for row in rows] != following:
            raise ValueError("rows must be written in the order of the run's keys")
        text = "".join(format_row(row, self.names) for row in rows)
        if not self._begun:
            self._begin(text)
        else:
            with self.csv_path.open("a", encoding="ascii", newline="") as file:
                file.write(text)
        self.rows += rows

    def _begin(self, text: str) -> None:
        """Put the first new rows where the earlier results are, and the record beside them.

        The record goes first and comes last, so that it never lies beside the rows of another run.
        """
        kept = self.csv_path.read_bytes()[: self._size].decode("ascii") if self._size else ",".join(self.names) + "\n"
        for name in (RECORD_NAME, EXAMPLES_NAME, *FIGURES):
            (self.folder / name).unlink(missing_ok=True)
        with replacing(self.csv_path) as path:
            path.write_text(kept + text, encoding="ascii", newline="")
        write_record(self.folder, self.record | {"status": "running"})
        self._begun = True

    def finish(self, summary: Record, finished: str) -> None:
        """Complete run.json; ``finished`` is the time. A run that was finished before stays as it is."""
        if not self._begun and read_record(self.folder).get("status") == "finished":
            return
        write_record(self.folder, self.record | {"status": "finished", "finished": finished, "summary": summary})


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)


def unfinished_rows(folder: Path) -> int:
    """How many rows of an interrupted run lie in the folder; 0 if there is none or it cannot be read."""
    try:
        if read_record(folder).get("status") != "running":
            return 0
        return len(read_rows(folder / CSV_NAME)[0])
    except (ResultError, OSError):
        return 0


def statistics(values: Sequence[float]) -> dict[str, float]:
    """min, mean, max and std (of the values themselves, divided by their number) of at least one value."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return {"min": min(values), "mean": mean, "max": max(values), "std": math.sqrt(variance)}


def summarize(rows: Sequence[Row]) -> Record:
    """Statistics of the radii, in input units, over all rows and, if there are frames, for each of them."""
    radii = [row.radius for row in rows]
    samples = len({row.index for row in rows})
    summary: Record = statistics(radii) | {
        "samples": samples,
        "not_certified": sum(radius == 0 for radius in radii),
        "evaluations_per_row": sum(row.evaluations for row in rows) / len(rows),
        "seconds_per_sample": math.fsum(row.seconds for row in rows) / samples,
    }
    frames = sorted({row.frame for row in rows if row.frame is not None})
    if frames:
        summary["frames"] = [
            {"frame": frame} | statistics([row.radius for row in rows if row.frame == frame]) for frame in frames
        ]
    return summary
