"""The table of methods, run tiny: its files, how it resumes, and what happens if methods contradict or fall short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from mnist_files import ROOT
from test_bound_scripts import Outcome, assert_one_line, call, make_checkpoint, make_data
from test_tables import FILES, rows_of

from utils.attack.attack_file import replay_attack
from utils.certify import certified_radius
from utils.network.checkpoint import load_checkpoint

SCRIPT = str(ROOT / "scripts" / "table_methods.py")
EFFORT = ("--alpha-steps", 2, "--curve-steps", 2, "--time-limit", 0.05)
# bab is left out where rows are compared: what it finds depends on the time.
REPEATABLE = ("crown", "alpha", "curve")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    models = [make_checkpoint(folder / "models", "rnn", activation=name) for name in ("tanh", "relu")]
    return models, make_data(folder / "mnist", models[0])


def arguments(place, out: Path, *flags: object, methods=REPEATABLE, images: int = 5) -> list[object]:
    models, data = place
    common = ("--models", *models, "--data-dir", data, "--out-dir", out, "--threads", 1, "--N", images)
    return [*common, "--batch-size", 3, "--p", "inf", "--methods", *methods, *EFFORT, *flags]


def run(place, out: Path, *flags: object, **options) -> Outcome:
    return call(SCRIPT, *arguments(place, out, *flags, **options))


def one_model(place):
    return place[0][:1], place[1]


def test_a_table_is_written_and_resumed(place, tmp_path):
    done = run(place, tmp_path)
    assert done.code == 0 and done.err == "", done.err
    folder = tmp_path / "methods"
    assert {path.name for path in folder.iterdir()} == FILES
    rows, summary = rows_of(folder / "rows.csv"), rows_of(folder / "summary.csv")
    first = {}
    for row in rows:
        sample = (row["model"], row["norm"], row["index"])
        before = first.setdefault(sample, row)
        assert row["attack"] == before["attack"] and row["target"] == "all"  # one attack for all methods
        assert 0 < float(before["radius"]) / 1.001 <= float(row["radius"]) <= float(row["attack"])
    assert len(rows) == 3 * len(first) and [row["method"] for row in rows[:3]] == list(REPEATABLE)
    for record in summary:
        own = [row for row in rows if (row["model"], row["method"]) == (record["model"], record["method"])]
        radii, attacks = ([float(row[name]) for row in own] for name in ("radius", "attack"))
        assert int(record["images"]) == len(own)
        assert float(record["ratio_of_means"]) == pytest.approx(sum(radii) / sum(attacks))
        ratios = [radius / attack for radius, attack in zip(radii, attacks, strict=True)]
        assert float(record["mean_of_ratios"]) == pytest.approx(sum(ratios) / len(ratios))
        assert record["below_cheaper"] == ("" if record["method"] == "crown" else "0")
    text = (folder / "table.md").read_text()
    assert "python scripts/table_methods.py" in text and "On no image" in text and "Means over the models" in text
    assert "--data-dir DATA" in text and str(tmp_path / "methods") not in text
    assert (folder / "figure.png").stat().st_size > 5000

    record = json.loads((folder / "run.json").read_text())
    content = (folder / "rows.csv").read_bytes()
    (folder / "rows.csv").write_bytes(content[: int(0.9 * len(content))])  # within the rows of the last image
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert run(place, tmp_path, "--resume").code == 0
    assert rows_of(folder / "rows.csv") == rows
    other = ("--resume", "--alpha-steps", 3)
    assert_one_line(run(place, tmp_path, *other), "cannot resume", "--alpha-steps was 2")
    assert rows_of(folder / "rows.csv") == rows


def test_a_dry_run_writes_nothing(place, tmp_path):
    done = run(place, tmp_path / "dry", "--dry-run")
    assert done.code == 0 and "rows of 2 models" in done.out and not (tmp_path / "dry").exists()


def test_every_method_in_any_order_with_random_targets(place, tmp_path):
    methods = ("bab", "crown", "ibp", "curve", "crown-ibp", "alpha")
    done = run(one_model(place), tmp_path, "--targeted", methods=methods, images=3)
    assert done.code == 0 and done.err == "", done.err
    rows = rows_of(tmp_path / "methods" / "rows.csv")
    assert [row["method"] for row in rows[:6]] == ["ibp", "crown-ibp", "crown", "alpha", "curve", "bab"]
    assert all(row["target"] != row["label"] and int(row["target"]) in range(10) for row in rows)
    summary = rows_of(tmp_path / "methods" / "summary.csv")
    assert [record["cheaper"] for record in summary] == ["", "", "", "crown", "alpha", "curve"]
    assert "one random other class" in (tmp_path / "methods" / "table.md").read_text()


@pytest.mark.full  # test_tables.py has the same of another table: the processes are shared by the same function
@pytest.mark.real_rounding
def test_two_processes_make_the_table_of_one(place, tmp_path):
    small = {"methods": ("crown", "alpha")}
    assert run(one_model(place), tmp_path / "one", **small).code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = [str(word) for word in (*torchrun, SCRIPT, *arguments(one_model(place), tmp_path / "two", **small))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / count / "methods" for count in ("one", "two"))
    assert rows_of(one / "rows.csv") == rows_of(two / "rows.csv")
    assert {path.name for path in two.iterdir()} == FILES


def scaled(method: str, factor: float):
    """certified_radius, with wrong radii of one method."""

    def find(*args, **options):
        return certified_radius(*args, **options) * (factor if options["method"] == method else 1.0)

    return mock.patch("utils.certify.certified_radius", find)


def test_a_radius_above_the_attack_s_stops_the_script_and_leaves_the_evidence(place, tmp_path):
    with scaled("alpha", 100.0):
        done = run(one_model(place), tmp_path)
    assert done.code == 3 and done.err.startswith("CONTRADICTION: ") and done.err.count("\n") == 1
    (evidence,) = (tmp_path / "methods").glob("contradiction_*.pt")
    facts = json.loads(evidence.with_suffix(".json").read_text())
    assert facts["method"] == "alpha" and facts["certified"] > facts["pgd"] and evidence.name in done.err
    replay = replay_attack(evidence, load_checkpoint(place[0][0])[0])
    assert replay.margin.item() < 0 and replay.valid.item() and replay.size.item() <= facts["certified"]
    assert not (tmp_path / "methods" / "table.md").exists()


@pytest.mark.parametrize("factor, images_short", [(0.9, True), (0.9995, False)])
def test_what_falls_short_of_a_cheaper_method_is_said_and_listed(factor, images_short, place, tmp_path):
    def find(*args, **options):  # both as crown, so that only the factor makes a difference
        radius = certified_radius(*args, **options | {"method": "crown"})
        return radius * (factor if options["method"] == "alpha" else 1.0)

    with mock.patch("utils.certify.certified_radius", find):
        done = run(one_model(place), tmp_path, methods=("crown", "alpha"))
    assert done.code == 0
    images = int(rows_of(tmp_path / "methods" / "summary.csv")[1]["images"]) if images_short else 0
    lines = done.err.splitlines()
    assert len(lines) == images and all(line.startswith("SHORTFALL: rnn_") for line in lines)
    text = (tmp_path / "methods" / "table.md").read_text()
    assert text.count("alpha certifies") == images and ("On no image" in text) == (not images_short)
    assert int(rows_of(tmp_path / "methods" / "summary.csv")[1]["below_cheaper"]) == images
