"""The table scripts, run tiny: what they write, how they resume and share work, and how contradictions stop them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mnist_files import ROOT
from test_bound_scripts import IMAGES, Outcome, assert_one_line, call, make_checkpoint, make_data

from utils.attack.attack_file import replay_attack
from utils.certify import certified_margin, certified_radius
from utils.network.checkpoint import load_checkpoint, save_checkpoint

FILES = {"rows.csv", "summary.csv", "table.md", "figure.png", "run.json"}
# Script, folder, flags, rows a sample of a model with 4 slices, and whether misclassified images have rows.
TABLES = {
    "radii": (("--p", "2"), 1, False),
    "frames": (("--p", "2"), 4, False),
    "accuracy": (("--p", "inf", "--eps", "0.02", "0.001", "--steps", "5"), 2, True),
    "relaxations": (("--p", "2"), 1, False),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    models = [make_checkpoint(folder / "models", kind) for kind in ("gru", "lstm")]
    return models, make_data(folder / "mnist", models[0])


def table(name: str, place, out: Path, *flags: object, images: int = 5) -> Outcome:
    models, data = place
    common = ("--models", *models[:1], "--data-dir", data, "--out-dir", out, "--threads", 1, "--N", images)
    return call(str(ROOT / "scripts" / f"table_{name}.py"), *common, "--batch-size", 3, *flags)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_written_resumed_and_refused(name, place, tmp_path):
    flags, width, everything = TABLES[name]
    outcome = table(name, place, tmp_path, *flags)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    folder = tmp_path / name
    assert {path.name for path in folder.iterdir()} == FILES
    rows = rows_of(folder / "rows.csv")
    images = len({row["index"] for row in rows})
    assert len(rows) == width * images and (images == 5 if everything else 3 <= images <= 5)
    text = (folder / "table.md").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert f"python scripts/table_{name}.py" in text and "commit" in text and "made 20" in text and "CPU" in text
    assert "--data-dir DATA" in text and str(tmp_path) not in text + json.dumps(record["arguments"])
    assert record["status"] == "finished" and (folder / "figure.png").stat().st_size > 5000
    check_summary(name, rows, rows_of(folder / "summary.csv"))

    content = (folder / "rows.csv").read_bytes()
    for share in (0.6,) if name == "radii" else (0.3, 0.95):
        (folder / "rows.csv").write_bytes(content[: int(share * len(content))])
        (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
        assert table(name, place, tmp_path, *flags, "--resume").code == 0
        assert rows_of(folder / "rows.csv") == rows
    assert_one_line(table(name, place, tmp_path, *flags, "--resume", images=6), "cannot resume", "--N was 5")
    assert rows_of(folder / "rows.csv") == rows
    assert table(name, place, tmp_path / "dry", *flags, "--dry-run").code == 0 and not (tmp_path / "dry").exists()


def check_summary(name: str, rows: list[dict], summary: list[dict]) -> None:
    if name == "radii":
        for record in summary:
            own = [row for row in rows if float(row["norm"]) == float(record["norm"])]
            assert int(record["images"]) == len(own)
            assert float(record["certified_mean"]) == pytest.approx(sum(float(r["certified"]) for r in own) / len(own))
            for row in own:
                assert 0 < float(row["certified"]) <= min(float(row["carlini_wagner"]), float(row["pgd"]))
    elif name == "frames":
        assert [int(record["frame"]) for record in summary] == [0, 1, 2, 3]
        assert all(float(row["radius"]) > 0 for row in rows)
    elif name == "accuracy":
        assert [float(record["eps"]) for record in summary] == [0.001, 0.02]
        assert all(int(row["verified"]) <= int(row["attacked"]) <= int(row["clean"]) for row in rows)
        assert float(summary[0]["clean"]) < 1 and float(summary[0]["verified"]) >= float(summary[1]["verified"])
    else:
        assert all(float(row["plane"]) >= float(row["constant"]) > 0 for row in rows)


def test_another_checkpoint_is_not_resumed(place, tmp_path):
    models, data = place
    copy = tmp_path / models[0].parent.name / "gru"
    copy.parent.mkdir()
    shutil.copy(models[0], copy)
    assert table("frames", ([copy], data), tmp_path, "--quick").code == 0
    model, config = load_checkpoint(copy)
    save_checkpoint(copy, model, config | {"note": "another"})
    assert_one_line(
        table("frames", ([copy], data), tmp_path, "--quick", "--resume"), "cannot resume", "sha256 of gru_4_4"
    )


def too_large(*args, **options):
    return 100.0 * certified_radius(*args, **options)


def too_sure(*args, **options):
    return certified_margin(*args, **options).abs() + 1.0


@pytest.mark.parametrize(
    "name, function, broken, flags",
    [
        ("radii", "certified_radius", too_large, ("--p", "2")),
        ("accuracy", "certified_margin", too_sure, ("--p", "inf", "--eps", "0.5", "--steps", "20")),
    ],
)
def test_a_broken_bound_stops_the_script_and_leaves_the_evidence(name, function, broken, flags, place, tmp_path):
    with mock.patch(f"utils.certify.{function}", broken):
        outcome = table(name, place, tmp_path, *flags)
    assert outcome.code == 3 and outcome.err.startswith("CONTRADICTION: ") and outcome.err.count("\n") == 1
    (evidence,) = (tmp_path / name).glob("contradiction_*.pt")
    assert evidence.name in outcome.err
    facts = json.loads(evidence.with_suffix(".json").read_text())
    assert facts["model"] == "gru_4_4" and f"_{facts['index']}.pt" in evidence.name
    replay = replay_attack(evidence, load_checkpoint(place[0][0])[0])
    assert replay.margin.item() < 0 and replay.valid.item()
    assert replay.size.item() <= facts["eps" if name == "accuracy" else "certified"]
    assert not (tmp_path / name / "table.md").exists()


@pytest.mark.full  # test_interrupted_runs.py and test_decide.py have the same of others: one function shares rows
@pytest.mark.real_rounding
def test_two_processes_make_the_table_of_one(place, tmp_path):
    models, data = place
    flags = ("--models", models[0], "--data-dir", data, "--threads", 1, "--N", IMAGES, "--batch-size", 2, "--out-dir")
    script = str(ROOT / "scripts" / "table_frames.py")
    assert call(script, *flags, tmp_path / "one").code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = [str(word) for word in (*torchrun, script, *flags, tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / count / "frames" for count in ("one", "two"))
    assert rows_of(one / "rows.csv") == rows_of(two / "rows.csv")
    assert {path.name for path in two.iterdir()} == FILES
    assert "torchrun --nproc-per-node 2 scripts/table_frames.py" in (two / "table.md").read_text()


def test_models_are_named_by_folder_or_path_and_must_differ(place, tmp_path):
    models, data = place
    assert_one_line(table("frames", (["nothing"], data), tmp_path), "no checkpoint", "nothing")
    twice = call(
        str(ROOT / "scripts" / "table_frames.py"), "--models", models[0], models[0], "--data-dir", data, "--N", 5
    )
    assert_one_line(twice, "same name")
    torch.save([1], tmp_path / "gru")
    assert_one_line(table("frames", ([tmp_path / "gru"], data), tmp_path), "not a checkpoint")


def test_the_grid_is_trained_by_the_training_scripts():
    done = call(str(ROOT / "scripts" / "train_all.py"), "--dry-run", "--kinds", "gru", "--hidden-sizes", 128)
    commands = [line for line in done.out.splitlines() if line.startswith("python")]
    assert done.code == 0 and len(commands) <= 3
    assert all("gru/train_gru_mnist_classifier.py --time-step" in line for line in commands)
