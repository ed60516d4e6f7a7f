"""The files of a bound run: rows, records, and what is left of them after an interruption."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from utils.runs.bound_rows import Key, Row, statistics, summarize
from utils.runs.results import (
    CSV_NAME,
    FIGURES,
    RECORD_NAME,
    ResultFolder,
    digest,
    read_record,
    replacing,
    write_record,
)
from utils.runs.rows import ResultError, column_names, format_row, parse_row
from utils.runs.rows import read_rows as read_rows_of

KEYS = [Key(7, 1, 1, 3), Key(2, 0, 0, "all"), Key(5, 9, 9, 4)]
RECORD = {"arguments": {"N": 3, "tol": 1e-3, "resume": False}, "model": {"sha256": "ab"}, "device": "cpu"}


def rows_of(keys: list[Key]) -> list[Row]:
    return [
        Row(**vars(key), radius=0.1 / (n + 3), failed_eps=math.inf if n == 1 else 0.2, margin=1e-17, evaluations=n)
        for n, key in enumerate(keys)
    ]


def read_rows(path):
    return read_rows_of(path, Row)


def written(folder, rows: list[Row], **options) -> ResultFolder:
    results = ResultFolder(folder, RECORD, KEYS, **options)
    results.append(rows)
    return results


@pytest.mark.parametrize("per_frame", [False, True])
def test_reading_a_row_gives_back_the_same_numbers(per_frame):
    for n, row in enumerate(rows_of(KEYS)):
        row = replace(row, seconds=0.25, frame=n if per_frame else None)
        names = column_names(Row, [row.key])
        assert ("frame" in names) == per_frame
        assert parse_row(format_row(row, names).rstrip("\n").split(","), names, Row) == row


def test_only_complete_lines_count_wherever_the_file_ends(tmp_path):
    rows = rows_of(KEYS)
    written(tmp_path, rows)
    content = (tmp_path / CSV_NAME).read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 1 + len(rows)
    for size in range(len(content) + 1):
        (tmp_path / CSV_NAME).write_bytes(content[:size])
        complete = sum(end <= size for end in ends)
        found, used = read_rows(tmp_path / CSV_NAME)
        assert found == rows[: max(0, complete - 1)]
        assert used == (ends[complete - 1] if complete else 0)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text.replace("index", "number"), "header"),
        (lambda text: text.replace("7,1,1,3", "7,1,1"), "line 2"),
        (lambda text: text.replace("7,1,1,3", "7,1,one,3"), "line 2"),
        (lambda text: text.replace("5,9", "\n5,9"), "line 4"),
        (lambda text: "\x00\xff" + text, "plain text"),
    ],
)
def test_damage_inside_the_file_is_an_error_that_says_where(tmp_path, damage, words):
    written(tmp_path, rows_of(KEYS))
    path = tmp_path / CSV_NAME
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(ResultError, match=words):
        read_rows(path)


def test_rows_are_in_the_file_as_soon_as_they_are_appended(tmp_path):
    rows = rows_of(KEYS)
    results = written(tmp_path, rows[:1])
    assert read_rows(tmp_path / CSV_NAME)[0] == rows[:1]
    assert read_record(tmp_path)["status"] == "running"
    results.append(rows[1:])
    assert read_rows(tmp_path / CSV_NAME)[0] == rows
    results.finish(summarize(rows), "now")
    assert read_record(tmp_path)["status"] == "finished"


def test_rows_that_will_not_be_made_anew_are_not_replaced(tmp_path):
    """Another sample, fewer samples or other data: only if asked for. The same rows again, or more: yes."""
    written(tmp_path, rows_of(KEYS))
    for keys, record in (
        (KEYS[:1], RECORD),
        (KEYS[1:], RECORD),
        (KEYS, RECORD | {"data": {"drawn_sha256": "other"}}),
    ):
        with pytest.raises(ResultError, match="give --overwrite"):
            ResultFolder(tmp_path, record, keys).replaced()
    earlier, changes = ResultFolder(tmp_path, RECORD, KEYS).replaced()
    assert earlier == len(KEYS) and changes == []
    changed = RECORD | {"arguments": RECORD["arguments"] | {"tol": 0.5}}
    earlier, changes = ResultFolder(tmp_path, changed, KEYS).replaced()
    assert earlier == len(KEYS) and "--tol was" in changes[0]
    (tmp_path / CSV_NAME).write_text("nothing that could be read")
    assert ResultFolder(tmp_path, RECORD, KEYS[:1]).replaced() == (0, [])


def test_more_samples_continue_fewer_that_begin_alike(tmp_path):
    samples = [b"one", b"two", b"three"]

    def record(count: int) -> dict:
        arguments = RECORD["arguments"] | {"N": count}
        counts, data = {"kept": count}, {"drawn_sha256": digest(samples[:count])}
        return RECORD | {"arguments": arguments, "counts": counts, "data": data}

    rows = rows_of(KEYS)
    ResultFolder(tmp_path, record(1), KEYS[:1]).append(rows[:1])
    grown = ResultFolder(tmp_path, record(2), KEYS[:2], resume=True, drawn=samples[:2])
    assert grown.rows == rows[:1]
    grown.append(rows[1:2])
    assert read_rows(tmp_path / CSV_NAME)[0] == rows[:2]
    for count, drawn in ((3, [b"two", b"one", b"three"]), (1, samples[:1])):
        with pytest.raises(ResultError, match="--N was 2"):
            ResultFolder(tmp_path, record(count), KEYS[:count], resume=True, drawn=drawn)


def test_rows_in_another_order_than_the_keys_are_refused(tmp_path):
    rows = rows_of(KEYS)
    with pytest.raises(ValueError, match="order"):
        written(tmp_path, rows[1:])
    assert not list(tmp_path.iterdir())


def test_earlier_results_stay_until_there_are_new_rows_and_then_go_together(tmp_path):
    written(tmp_path, rows_of(KEYS)).finish({}, "now")
    (tmp_path / FIGURES[0]).write_bytes(b"figure")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    results = ResultFolder(tmp_path, RECORD, KEYS[:1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    results.append(rows_of(KEYS[:1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CSV_NAME, RECORD_NAME]
    assert len(read_rows(tmp_path / CSV_NAME)[0]) == 1


def test_a_resumed_run_keeps_the_complete_rows_and_says_so(tmp_path):
    rows = rows_of(KEYS)
    written(tmp_path, rows)
    whole = (tmp_path / CSV_NAME).read_bytes()
    (tmp_path / CSV_NAME).write_bytes(whole[:-5])
    results = ResultFolder(tmp_path, RECORD, KEYS, resume=True)
    assert results.rows == rows[:2] and (tmp_path / CSV_NAME).read_bytes() == whole[:-5]
    results.append(rows[2:])
    assert (tmp_path / CSV_NAME).read_bytes() == whole
    assert [part["rows"] for part in read_record(tmp_path)["resumed"]] == [2]


def test_resuming_without_earlier_results_starts_a_run(tmp_path):
    written(tmp_path, rows_of(KEYS), resume=True)
    assert read_rows(tmp_path / CSV_NAME)[0] == rows_of(KEYS)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda record: record["arguments"].update(tol=0.1), "--tol was 0.1, now it is 0.001"),
        (lambda record: record["arguments"].update(extra=1), "--extra was 1, now it is not given"),
        (lambda record: record["model"].update(sha256="cd"), "sha256"),
        (lambda record: record.update(device="cuda"), "the device was cuda"),
    ],
)
def test_another_run_is_not_continued(tmp_path, change, words):
    written(tmp_path, rows_of(KEYS)[:2])
    record = read_record(tmp_path)
    change(record)
    write_record(tmp_path, record)
    with pytest.raises(ResultError, match=words):
        ResultFolder(tmp_path, RECORD, KEYS, resume=True)


def test_rows_or_record_that_do_not_belong_are_not_continued(tmp_path):
    written(tmp_path, rows_of(KEYS)[:2])
    with pytest.raises(ResultError, match="rows are not those"):
        ResultFolder(tmp_path, RECORD, KEYS[1:], resume=True)
    (tmp_path / RECORD_NAME).write_text("{")
    with pytest.raises(ResultError, match="damaged"):
        ResultFolder(tmp_path, RECORD, KEYS, resume=True)
    (tmp_path / RECORD_NAME).unlink()
    with pytest.raises(ResultError, match="missing"):
        ResultFolder(tmp_path, RECORD, KEYS, resume=True)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    write_record(tmp_path, {"arguments": {}})
    with pytest.raises(ValueError):
        write_record(tmp_path, {"arguments": {}, "mean": math.nan})
    with pytest.raises(RuntimeError), replacing(tmp_path / RECORD_NAME) as path:
        path.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / RECORD_NAME).read_text()) == {"arguments": {}}
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_statistics_of_known_numbers():
    assert statistics([1.0, 2.0, 3.0, 6.0]) == {"min": 1.0, "mean": 3.0, "max": 6.0, "std": math.sqrt(3.5)}
    rows = [replace(row, frame=n % 2, index=n // 2, radius=float(n)) for n, row in enumerate(rows_of(KEYS + KEYS[:1]))]
    summary = summarize(rows)
    assert (summary["samples"], summary["not_certified"], summary["mean"]) == (2, 1, 1.5)
    assert [frame["mean"] for frame in summary["frames"]] == [1.0, 2.0]
