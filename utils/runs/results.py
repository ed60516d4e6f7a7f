"""The folder of a run: a CSV file, one row per sample as it is finished, and run.json about the run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .bound_rows import Row
from .lock import locked
from .ranks import ALONE, Ranks
from .rows import KeyedRow, ResultError, column_names, format_row, read_rows, split_row

CSV_NAME = "certified_bound.csv"
RECORD_NAME = "run.json"
EXAMPLES_NAME = "examples.npz"
FIGURES = ("radius_histogram.png", "certified_fraction.png", "frame_heatmap.png")
TEMPORARY_PREFIX = ".saving-"
# Where things lie and how they are run; everything else must agree when a run is resumed.
FREE_ARGUMENTS = (
    *("work_dir", "data_dir", "out_dir", "resume", "overwrite", "dry_run"),
    *("threads", "device", "cuda", "show"),
)

Record = dict[str, Any]


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
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_record(folder: Path, record: Record) -> None:
    """Write run.json, whole or not at all. NaN and infinities, which JSON does not have, raise ValueError."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with replacing(folder / RECORD_NAME) as path:
        path.write_text(text, encoding="utf-8")


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the samples of a run."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()


def identity(record: Record) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other, by the name to be shown to the user."""
    arguments = {
        f"--{name.replace('_', '-')}": value
        for name, value in record["arguments"].items()
        if name not in FREE_ARGUMENTS
    }
    facts = {
        "the checkpoint's sha256": record.get("model", {}).get("sha256"),
        "the drawn samples' sha256": record.get("data", {}).get("drawn_sha256"),
        "the device": str(record.get("device")).partition(":")[0],
    }
    facts |= {f"the sha256 of {name}": sha256 for name, sha256 in record.get("checkpoints", {}).items()}
    return arguments | facts


def check_writable(folder: Path) -> None:
    """Make the folder and try to write in it. Raises OSError if either fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which ways the ``identity`` of one run is not another's, in words."""
    return [
        f"{name} was {_shown(then.get(name))}, now it is {_shown(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


class ResultFolder:
    """Writes the results of one run, which one process or several share.

    A run is a list of keys, one for every row to come, in order. A process that is alone appends its rows in that order
    to the CSV file, which is always a prefix of the whole result. Of several processes each appends to a part file of
    its own, in any order; in the end, or when one process resumes the run, the parts are merged. Whichever wrote a row
    that is complete, it is not asked for again.

    Nothing in the folder changes before the first new rows are there. Earlier results are replaced then, or, if the run
    is resumed, continued. The folder should be locked (``exclusive``).

    Args:
        folder: must exist.
        record: what run.json says about the run.
        keys: what the rows will be about, in order.
        kind: the class of the rows.
        resume: continue what lies in the folder.
        ranks: the processes of the run.
        csv_name: name of the file of the rows.
        derived: names of what is made of all rows in the end.
        attached: names of files and folders that are written along with the rows.
        columns: names of columns that this run has, of those that are left out otherwise.
        drawn: the samples as bytes, in order, whose ``digest`` the record has: then a resumed run may have more of them
            than the earlier one, if they begin alike.

    Attributes:
        found: the rows so far, by key.

    Raises:
        ResultError: resume was asked for, but what lies there is damaged or belongs to another run.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        keys: Sequence[Hashable],
        *,
        kind: type[KeyedRow] = Row,
        resume: bool = False,
        ranks: Ranks = ALONE,
        csv_name: str = CSV_NAME,
        derived: Sequence[str] = (EXAMPLES_NAME, *FIGURES),
        attached: Sequence[str] = (),
        columns: Sequence[str] = (),
        drawn: Sequence[bytes] = (),
    ):
        self.folder, self.record, self.keys, self.kind = folder, dict(record), list(keys), kind
        self.ranks, self.derived, self.attached, self.drawn = ranks, tuple(derived), tuple(attached), drawn
        self.names = column_names(kind, self.keys, columns)
        self.csv_path = folder / csv_name
        self.own_path = self.csv_path if ranks.world == 1 else part_path(self.csv_path, ranks.rank)
        self.found: dict[Hashable, KeyedRow] = {}
        self._number = {key: number for number, key in enumerate(self.keys)}
        self._written = 0  # rows in the CSV file, if this process is alone
        self._begun = False
        if resume:
            self._find_earlier()

    @property
    def rows(self) -> list[KeyedRow]:
        """The rows so far, in the order of the keys."""
        return [self.found[key] for key in self.keys if key in self.found]

    @property
    def missing(self) -> list[Hashable]:
        """The keys whose rows are not there yet, in order."""
        return [key for key in self.keys if key not in self.found]

    def _find_earlier(self) -> None:
        files = result_files(self.csv_path)
        if not files:
            return
        if not (self.folder / RECORD_NAME).exists():
            raise ResultError(f"cannot resume in {self.folder}: {RECORD_NAME} is missing; leave out --resume")
        earlier = read_record(self.folder)
        for change in differences(identity(self._grown(earlier)), identity(self.record)):
            raise ResultError(f"cannot resume in {self.folder}: {change}; leave out --resume to start again")
        for path in files:
            rows, _ = read_rows(path, self.kind)
            numbers = [self._number.get(row.key) for row in rows]
            if None in numbers or (path == self.csv_path and numbers != list(range(len(rows)))):
                raise ResultError(f"cannot resume in {self.folder}: its rows are not those of this run")
            self.found = {row.key: row for row in rows} | self.found
            self._written = len(rows) if path == self.csv_path else self._written
        if self.found and (self.missing or earlier.get("status") != "finished"):
            before = {name: earlier.get(name) for name in ("commit", "versions", "started")}
            self.record["resumed"] = [*earlier.get("resumed", []), {"rows": len(self.found), **before}]

    def _grown(self, earlier: Record) -> Record:
        """The record of an earlier run with fewer samples, if this one begins with them, as one of all of these."""
        kept, sha256 = earlier.get("counts", {}).get("kept"), earlier.get("data", {}).get("drawn_sha256")
        fewer = earlier["arguments"].get("N", 0) < self.record["arguments"].get("N", 0)
        if not fewer or not kept or not self.drawn or digest(self.drawn[:kept]) != sha256:
            return earlier
        arguments = earlier["arguments"] | {"N": self.record["arguments"]["N"]}
        return earlier | {"arguments": arguments, "data": self.record["data"]}

    def replaced(self) -> tuple[int, list[str]]:
        """How many rows of another run lie in the folder, and in which ways that run was another.

        Raises:
            ResultError: this run will not make all of these rows and columns anew.
        """
        files = result_files(self.csv_path)
        try:
            earlier = read_record(self.folder)
            rows = [row for path in files for row in read_rows(path, self.kind)[0]]
            columns = {name for path in files for name in split_row(path.read_text(encoding="utf-8").split("\n")[0])}
        except (ResultError, OSError, ValueError):
            return 0, []  # nothing that could be used
        then, now = identity(earlier), identity(self.record)
        changes = differences(then, now)
        keys, drawn = set(self.keys), "the drawn samples' sha256"
        lost = sum(row.key not in keys for row in rows)
        other_data = then.get(drawn) != now.get(drawn) and then.get("--N") == now.get("--N")
        if rows and (lost or columns - set(self.names) or other_data):
            raise ResultError(
                f"{self.folder} holds {len(rows)} rows of another run ({'; '.join(changes) or 'other rows'}): "
                "give --overwrite to replace them, or another folder by --out-dir"
            )
        return len(rows), changes

    def append(self, rows: Sequence[KeyedRow]) -> None:
        """Write new rows, which must be those of missing keys, in the keys' order, and flush them."""
        keys, missing = [row.key for row in rows], self.missing
        if self.ranks.world == 1:
            due = missing[: len(rows)]
        else:
            chosen = set(keys)
            due = [key for key in missing if key in chosen]
        if keys != due:
            raise ValueError("rows must be written in the order of the run's keys")
        self.begin()
        self.found |= dict(zip(keys, rows, strict=True))
        self._write(rows)

    def _write(self, rows: Sequence[KeyedRow]) -> None:
        if self.ranks.world == 1:  # with the rows that follow here and were found in parts
            end = next((n for n, key in enumerate(self.keys) if key not in self.found), len(self.keys))
            rows = [self.found[key] for key in self.keys[self._written : end]]
            self._written = end
        with self.own_path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(format_row(row, self.names) for row in rows))

    def begin(self) -> None:
        """Put the record and files without half-written lines where the new rows will come; done once, by all ranks.

        Files of another run go before its record is replaced, so that the record never lies beside rows that are not
        its own, whenever this ends; then there is nothing to resume, or a run to be resumed.
        """
        if self._begun:
            return
        self._begun = True
        self.ranks.wait()
        if self.ranks.first:
            for path in [] if self.found else result_files(self.csv_path):
                path.unlink()
            write_record(self.folder, self.record | {"status": "running"})
            self._remove(self.derived if self.found else self.derived + self.attached)
        self.ranks.wait()
        own = read_rows(self.own_path, self.kind)[0] if self.own_path.exists() else []
        self._replace(self.own_path, own)

    def _remove(self, names: Sequence[str]) -> None:
        for path in (self.folder / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _replace(self, path: Path, rows: Sequence[KeyedRow]) -> None:
        text = ",".join(self.names) + "\n" + "".join(format_row(row, self.names) for row in rows)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")

    def merge(self) -> None:
        """Wait for all processes; then the first one has all rows, and writes the whole CSV file if there are parts."""
        self.ranks.wait()
        if not self.ranks.first:
            return
        parts = [path for path in result_files(self.csv_path) if path != self.csv_path]
        if parts and (self._begun or self.found):
            for path in parts:
                self.found = {row.key: row for row in read_rows(path, self.kind)[0]} | self.found
            self._replace(self.csv_path, self.rows)
            for path in parts:
                path.unlink()

    def finish(self, summary: Record, finished: str) -> None:
        """Complete run.json; ``finished`` is the time. A run that was finished before stays as it is."""
        if not self._begun and read_record(self.folder).get("status") == "finished":
            return
        write_record(self.folder, self.record | {"status": "finished", "finished": finished, "summary": summary})


def part_path(csv_path: Path, rank: int | str) -> Path:
    """The file of one of several processes."""
    return csv_path.with_name(f"{csv_path.stem}.part-{rank}.csv")


def result_files(csv_path: Path) -> list[Path]:
    """The CSV file and its parts, as far as they are there, in this order."""
    parts = csv_path.parent.glob(part_path(csv_path, "*").name)
    return [path for path in (csv_path, *sorted(parts)) if path.exists()]


@contextmanager
def exclusive(folder: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Hold the folder's lock for all processes of a run; what killed runs were writing is removed."""
    with locked(folder) if ranks.first else nullcontext():
        if ranks.first:
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(path)
        ranks.wait()
        yield


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text
