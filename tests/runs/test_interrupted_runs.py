"""Runs that are killed, shared by processes of torchrun, or started twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mnist_files import ROOT, run_script
from test_bound_scripts import IMAGES, SIZES, assert_one_line, make_place, without_seconds
from test_results import KEYS, RECORD, rows_of

from utils.runs.lock import LOCK_NAME, locked
from utils.runs.ranks import ALONE, Ranks
from utils.runs.results import CSV_NAME, ResultFolder, part_path, read_record
from utils.runs.rows import ResultError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("runs"))
    assert place.bound("--batch-size", 2).code == 0
    return place


def flags_of(place) -> list[str]:
    flags = (*SIZES, "--work-dir", place.work, "--data-dir", place.data, "--N", IMAGES, "--threads", 1)
    return list(map(str, (*flags, "--batch-size", 2)))


def start_torchrun(processes: int, place, *flags: str) -> subprocess.Popen:
    command = [*TORCHRUN, str(processes), str(ROOT / place.script), *flags_of(place), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("kills, seed", [(10, 0), pytest.param(24, 1, marks=pytest.mark.full)])
def test_killed_at_random_points_a_run_resumes_to_the_same_rows(tmp_path, kills, seed):
    place = make_place(tmp_path)
    arguments = (kills, seed, ROOT / place.script, *flags_of(place), "--tol", 0.5)
    result = run_script("tests/kill_runs.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    (killed,) = re.findall(r"killed (\d+) times", result.stdout)
    assert int(killed) >= kills


@pytest.mark.real_rounding
def test_two_processes_give_the_rows_of_one(finished, tmp_path):
    reference = without_seconds(finished.folder() / CSV_NAME)
    place = copy_without_results(finished, tmp_path)
    run = start_torchrun(2, place)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.count("to certify") == 1, "the first process alone should print"
    assert without_seconds(place.folder() / CSV_NAME) == reference
    assert read_record(place.folder())["processes"] == 2
    names = {path.name for path in place.folder().iterdir()}
    assert names == {CSV_NAME, "run.json", "radius_histogram.png", "certified_fraction.png"}


def test_what_a_killed_process_finished_is_kept_by_any_number_of_processes(finished, tmp_path):
    place = copy_without_results(finished, tmp_path)
    flags = ("--batch-size", "1", "--tol", "1e-6", "--per-frame")
    run = start_torchrun(2, place, *flags)
    folder = place.folder("2_norm_bound_per_frame_crown")
    parts = [part_path(folder / CSV_NAME, rank) for rank in range(2)]
    try:
        wait_for(lambda: all(path.exists() and path.read_bytes().count(b"\n") > 1 for path in parts), run)
        os.kill(worker_of(run, 1), signal.SIGKILL)
    finally:
        _, err = run.communicate(timeout=60)
    assert run.returncode != 0, err
    before = [path.read_text().splitlines()[1:] for path in parts]
    kept = sum(map(len, before))
    assert kept >= 2 * 4
    outcome = place.bound(*flags, "--resume")
    assert outcome.code == 0 and f"resuming: {kept} of {4 * (IMAGES - 2)}" in outcome.out, outcome
    lines = (folder / CSV_NAME).read_text().splitlines()
    assert len(lines) == 1 + 4 * (IMAGES - 2) and all(line in lines for part in before for line in part)
    assert not any(path.exists() for path in parts)


def wait_for(condition, run: subprocess.Popen, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def worker_of(run: subprocess.Popen, rank: int) -> int:
    """The process of a rank among torchrun's children."""
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def copy_without_results(place, folder: Path):
    shutil.copytree(place.work, folder / "models")
    copied = type(place)(
        folder / "models", place.data, folder / "models" / place.checkpoint.relative_to(place.work), place.script
    )
    shutil.rmtree(copied.folder())
    return copied


def ranks_of(count: int) -> list[Ranks]:
    """Ranks that do not wait for each other, to be used one after the other."""

    class Patient(Ranks):
        def wait(self) -> None:
            pass

    return [Patient(rank, count) for rank in range(count)]


def test_parts_of_three_are_continued_by_two_and_by_one(tmp_path):
    rows = rows_of(KEYS)
    for ranks, row in zip(ranks_of(3)[:2], (rows[2], rows[0]), strict=True):
        results = ResultFolder(tmp_path, RECORD, KEYS, resume=not ranks.first, ranks=ranks)
        results.append([row])
    part_path(tmp_path / CSV_NAME, 1).open("a").write("2,0,0")  # half a row
    for count in (2, 1):
        shutil.copytree(tmp_path, tmp_path / "copy")
        every = ranks_of(count) if count > 1 else [ALONE]
        folders = [ResultFolder(tmp_path / "copy", RECORD, KEYS, resume=True, ranks=ranks) for ranks in every]
        assert all(results.missing == KEYS[1:2] for results in folders)
        folders[-1].append(rows[1:2])
        folders[0].merge()
        assert folders[0].rows == rows
        content = (tmp_path / "copy" / CSV_NAME).read_bytes()
        again = ResultFolder(tmp_path / "copy", RECORD, KEYS, resume=True)
        assert again.rows == rows and not list((tmp_path / "copy").glob("*part*"))
        assert content.count(b"\n") == 4
        shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ResultError, match="--tol was"):
        ResultFolder(tmp_path, RECORD | {"arguments": RECORD["arguments"] | {"tol": 0.5}}, KEYS, resume=True)


def test_a_run_of_other_arguments_removes_parts(tmp_path):
    rows = rows_of(KEYS)
    ResultFolder(tmp_path, RECORD, KEYS, ranks=ranks_of(2)[1]).append(rows[:1])
    ResultFolder(tmp_path, RECORD, KEYS).append(rows[:1])
    assert not list(tmp_path.glob("*part*"))
    assert ResultFolder(tmp_path, RECORD, KEYS, resume=True).rows == rows[:1]


def test_a_folder_in_use_is_refused_and_free_again_afterwards(finished, tmp_path):
    with locked(finished.folder()):
        assert_one_line(finished.bound("--batch-size", 2), "in use by another run", f"process {os.getpid()}")
    assert not (finished.folder() / LOCK_NAME).exists()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom utils.runs.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid}"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
