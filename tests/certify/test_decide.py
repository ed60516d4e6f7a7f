"""scripts/decide.py, run tiny: every verdict, counter-examples that hold, how it resumes, and how it fails."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mnist_files import ROOT
from test_bound_scripts import IMAGES, Outcome, assert_one_line, call, make_checkpoint, make_data

from utils.attack.attack_file import replay_attack, save_attack
from utils.attack.pgd import AttackResult
from utils.network.checkpoint import load_checkpoint

SCRIPT = str(ROOT / "scripts" / "decide.py")
WRONG = 2  # images of the data that the model misclassifies
SMALL, LARGE = 1e-6, 1.0
COLUMNS = ["index", "label", "prediction", "target", "eps", "verdict", "margin", "seconds"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decide")
    model = make_checkpoint(folder / "models", "gru")
    return model, make_data(folder / "mnist", model)


def arguments(place, out: Path | None, eps: float, *flags: object, images: int = IMAGES) -> list[object]:
    model, data = place
    own = () if out is None else ("--out-dir", out)
    common = ("--model", model, "--data-dir", data, "--threads", 1, "--N", images)
    return [*common, *own, "--p", "inf", "--eps", eps, "--time-limit", 5, *flags]


def run(place, out: Path | None, eps: float, *flags: object, **options) -> Outcome:
    return call(SCRIPT, *arguments(place, out, eps, *flags, **options))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "verdicts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def misclassified(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["label"] != row["prediction"]]


def check_examples(folder: Path, place, eps: float) -> None:
    """Every falsified image, and no other, has a file that breaks it with the margin of its row."""
    model = load_checkpoint(place[0])[0]
    falsified = [row for row in rows_of(folder) if row["verdict"] == "falsified"]
    files = {f"{int(row['index']):05d}.pt": row for row in falsified}
    assert {path.name for path in (folder / "counterexamples").iterdir()} == set(files)
    for name, row in files.items():
        replay = replay_attack(folder / "counterexamples" / name, model)
        clean = row["label"] != row["prediction"]
        assert replay.margin.item() == pytest.approx(float(row["margin"])) and replay.margin.item() < 0
        assert replay.valid.item() and replay.size.item() <= (0 if clean else eps)


def test_a_small_eps_is_certified_but_for_misclassified_images(place, tmp_path):
    done = run(place, tmp_path, SMALL)
    assert done.code == 0 and done.err == "", done.err
    rows = rows_of(tmp_path)
    assert list(rows[0]) == COLUMNS and len(rows) == IMAGES and {row["target"] for row in rows} == {"all"}
    assert len(misclassified(rows)) == WRONG
    for row in rows:
        right = row["label"] == row["prediction"]
        assert row["verdict"] == ("certified" if right else "falsified") and (float(row["margin"]) > 0) == right
    check_examples(tmp_path, place, SMALL)
    record = json.loads((tmp_path / "run.json").read_text())
    own = {"images": IMAGES, "certified": IMAGES - WRONG, "falsified": WRONG, "unknown": 0, "misclassified": WRONG}
    assert record["status"] == "finished" and record["summary"].items() >= own.items()
    assert "--data-dir DATA" in record["command"] and str(tmp_path) not in json.dumps(record)
    assert f"{IMAGES - WRONG} certified, {WRONG} falsified ({WRONG} of them misclassified as they are)" in done.out
    assert "pixel values in [0, 1]" in done.out and done.out.count("misclassified without any perturbation") == WRONG


@pytest.mark.parametrize("flags", [(), ("--clip",), ("--p", "2", "--targeted")])
def test_a_large_eps_is_falsified_by_examples_that_hold(flags, place, tmp_path):
    eps = 28.0 if "--p" in flags else LARGE  # l_2: a ball that holds every image
    done = run(place, tmp_path, eps, *flags, "--time-limit", 1e-9)
    assert done.code == 0 and done.err == "", done.err
    rows = rows_of(tmp_path)
    broken = [row for row in rows if row["verdict"] == "falsified"]
    assert len(misclassified(broken)) == WRONG < len(broken)
    assert all(row["target"] != row["label"] for row in rows)
    assert ("all" in {row["target"] for row in rows}) == ("--targeted" not in flags)
    check_examples(tmp_path, place, eps)
    moved = [torch.load(path, weights_only=True) for path in (tmp_path / "counterexamples").iterdir()]
    inside = all(bool(((one["perturbed"] >= 0) & (one["perturbed"] <= 1)).all()) for one in moved)
    assert inside == ("--clip" in flags)


def test_images_are_unknown_when_time_is_up(place, tmp_path):
    done = run(place, tmp_path, SMALL, "--time-limit", 1e-9, images=IMAGES)
    assert done.code == 0
    rows = rows_of(tmp_path)
    assert [row["margin"] for row in rows if row["verdict"] == "unknown"] == ["-inf"] * (IMAGES - WRONG)
    assert f"0 certified, {WRONG} falsified" in done.out and f"{IMAGES - WRONG} unknown of {IMAGES}" in done.out
    json.loads((tmp_path / "run.json").read_text())


def test_an_interrupted_run_is_resumed(place, tmp_path):
    assert run(place, tmp_path, SMALL).code == 0
    rows, record = rows_of(tmp_path), json.loads((tmp_path / "run.json").read_text())
    content = (tmp_path / "verdicts.csv").read_bytes()
    (tmp_path / "verdicts.csv").write_bytes(content[: int(0.5 * len(content))])
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    for path in (tmp_path / "counterexamples").iterdir():  # those of rows that are there must not be made anew
        if f"\n{int(path.stem)}," not in content[: int(0.45 * len(content))].decode():
            path.unlink()
    done = run(place, tmp_path, SMALL, "--resume")
    assert done.code == 0 and f"of {IMAGES} rows are there" in done.out
    assert timeless(rows_of(tmp_path)) == timeless(rows)
    assert json.loads((tmp_path / "run.json").read_text())["resumed"][0]["rows"] >= 1
    check_examples(tmp_path, place, SMALL)
    assert_one_line(run(place, tmp_path, 2 * SMALL, "--resume"), "cannot resume", "--eps was 1e-06")
    assert timeless(rows_of(tmp_path)) == timeless(rows)
    # A new run leaves no counter-examples of the one that it replaces.
    assert run(place, tmp_path, SMALL, "--seed", 1, "--overwrite", images=2).code == 0
    assert len(rows_of(tmp_path)) == 2
    if any(row["verdict"] == "falsified" for row in rows_of(tmp_path)):
        check_examples(tmp_path, place, SMALL)
    else:
        assert not (tmp_path / "counterexamples").exists()


def test_results_lie_beside_the_checkpoint_and_a_dry_run_writes_none(place):
    folder = place[0].parent
    before = set(folder.iterdir())
    done = run(place, None, SMALL, "--clip", "--dry-run")
    assert done.code == 0 and "dry run: image" in done.out and set(folder.iterdir()) == before
    assert run(place, None, SMALL, "--clip", "--targeted", images=1).code == 0
    assert {path.name for path in set(folder.iterdir()) - before} == {"inf_norm_verdicts_targeted_clip"}


def test_a_counterexample_that_does_not_hold_stops_the_script(place, tmp_path):
    def save_clean(path, result, x, labels, **threat):
        save_attack(path, AttackResult(x.double(), result.margin), x, labels, **threat)

    with mock.patch("utils.attack.attack_file.save_attack", save_clean):
        done = run(place, tmp_path, LARGE, "--time-limit", 1e-9)
    assert done.code == 3 and done.err.startswith("CONTRADICTION: the counter-example") and done.err.count("\n") == 1
    last = f"{int(rows_of(tmp_path)[-1]['index']):05d}.pt" if rows_of(tmp_path) else ""
    (evidence,) = [path for path in (tmp_path / "counterexamples").iterdir() if path.name in done.err]
    assert evidence.name != last and json.loads((tmp_path / "run.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--eps", "0"), ("--eps", "above 0")),
        (("--eps", "nan"), ("--eps",)),
        (("--time-limit", "0"), ("--time-limit",)),
        (("--p", "3"), ("--p", "1, 2 or inf")),
        (("--p", "0"), ("--k", "--p 0")),
        (("--k", "2"), ("--eps",)),
        (("--targeted", "--untargeted"), ("not allowed with",)),
        (("--N", "1000"), ("--N 1000", f"the {IMAGES} test images")),
        (("--model", "lstm_of_nobody"), ("there is no checkpoint",)),
        (("--device", "abacus"), ("abacus",)),
    ],
)
def test_bad_flags_end_in_one_line_and_write_nothing(flags, words, place, tmp_path):
    assert_one_line(run(place, tmp_path / "out", SMALL, *flags), *words)
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_data_ends_in_one_line(place, tmp_path):
    other = make_checkpoint(tmp_path, "gru", input_size=7)
    assert_one_line(run((other, place[1]), tmp_path / "out", SMALL), "7")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no checkpoint")
    assert_one_line(run((damaged, place[1]), tmp_path / "out", SMALL), "damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_two_processes_decide_as_one(place, tmp_path):
    assert run(place, tmp_path / "one", SMALL).code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = [str(word) for word in (*torchrun, SCRIPT, *arguments(place, tmp_path / "two", SMALL))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert timeless(rows_of(tmp_path / "one")) == timeless(rows_of(tmp_path / "two"))
    check_examples(tmp_path / "two", place, SMALL)
