"""The bound scripts, run tiny: what they write, how they resume, and how they fail."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from mnist_files import ROOT, run_script, write_idx, write_mnist_folder

from data.mnist import as_frames, load_mnist
from utils.certify import certified_radius
from utils.experiments.arguments import result_folder_name
from utils.experiments.mnist import Run
from utils.network.checkpoint import build_model, load_checkpoint, model_name, save_checkpoint
from utils.runs.bound_rows import read_bound_rows
from utils.runs.cli import run_main
from utils.runs.results import read_record

FRAMES, HIDDEN, IMAGES = 4, 4, 12
INF = float("inf")
SCRIPTS = {"rnn": "vanilla_rnn/bound_vanilla_rnn.py", "lstm": "lstm/bound_lstm.py", "gru": "gru/bound_gru.py"}
SIZES = ("--time-step", FRAMES, "--hidden-size", HIDDEN)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def call(script: str, *arguments: object) -> Outcome:
    """Run a script's main() in this process, as its last lines do."""
    spec = importlib.util.spec_from_file_location("bound_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
    ):
        sys.modules[spec.name] = module  # and out again by itself: modules that it imports must stay
        try:
            spec.loader.exec_module(module)
            run_main(module.main)
        except SystemExit as end:
            code = end.code or 0
        finally:
            del sys.modules[spec.name]
    return Outcome(code, out.getvalue(), err.getvalue())


def make_checkpoint(work: Path, architecture: str = "rnn", **changes) -> Path:
    """A tiny untrained model in its model folder."""
    config = {
        "architecture": architecture,
        "input_size": 784 // FRAMES,
        "num_frames": FRAMES,
        "hidden_size": HIDDEN,
        "num_layers": 1,
        "num_classes": 10,
        "bidirectional": False,
        "bias": True,
        "activation": "tanh" if architecture == "rnn" else None,
        "pooling": "last",
        "input_mean": 0.1,
        "input_std": 0.5,
    } | changes
    torch.manual_seed(1)
    model = build_model(config)
    path = work / model_name(config) / architecture
    save_checkpoint(path, model, config)
    return path


def make_data(folder: Path, path: Path) -> Path:
    """An MNIST folder whose test labels are what the checkpoint says, but for the first two images."""
    write_mnist_folder(folder, train=10, test=IMAGES)
    model, config = load_checkpoint(path)
    images = as_frames(load_mnist(folder).test_x, config["num_frames"])
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 10
    write_idx(folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", labels.numpy())
    return folder


@dataclass
class Place:
    """A work folder with one checkpoint, and data of which it gets all but two images right."""

    work: Path
    data: Path
    checkpoint: Path
    script: str

    def bound(self, *arguments: object) -> Outcome:
        flags = ("--work-dir", self.work, "--data-dir", self.data, "--N", IMAGES, "--batch-size", 4, "--threads", 1)
        return call(self.script, *SIZES, *flags, *arguments)

    def folder(self, name: str = "2_norm_bound_crown") -> Path:
        return self.checkpoint.parent / name

    def rows(self, name: str = "2_norm_bound_crown"):
        return read_bound_rows(self.folder(name) / "certified_bound.csv")

    def samples(self, rows):
        """Model, frames and labels of the rows' images, read anew."""
        model, config = load_checkpoint(self.checkpoint)
        data = load_mnist(self.data)
        index = [row.index for row in rows]
        return model, as_frames(data.test_x[index], config["num_frames"]), data.test_y[index]


def make_place(folder: Path, architecture: str = "rnn", **changes) -> Place:
    checkpoint = make_checkpoint(folder / "models", architecture, **changes)
    return Place(folder / "models", make_data(folder / "mnist", checkpoint), checkpoint, SCRIPTS[architecture])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("bound"))


@pytest.fixture(scope="module")
def finished(place) -> Place:
    """The place, with results of a default and of a per-frame run."""
    for flags in ((), ("--per-frame",)):
        assert place.bound(*flags).code == 0
    return place


@pytest.fixture
def copied(finished, tmp_path) -> Place:
    """A copy of the place and its results, to do damage to."""
    shutil.copytree(finished.work, tmp_path / "models")
    checkpoint = tmp_path / "models" / finished.checkpoint.relative_to(finished.work)
    return Place(tmp_path / "models", finished.data, checkpoint, finished.script)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_seconds(path: Path) -> list[str]:
    return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]


def assert_one_line(outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_default_run_from_another_folder(place, tmp_path):
    shutil.copytree(place.work, tmp_path / "models")
    flags = ("--work-dir", "models", "--data-dir", place.data, "--N", IMAGES)
    result = run_script(place.script, *SIZES, *flags, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    for words in (
        "10 to certify",
        "2 misclassified",
        "pixel values",
        "l_2",
        "min",
        "mean",
        "max",
        "std",
        "s per image",
    ):
        assert words in result.stdout
    folder = tmp_path / "models" / "rnn_4_4_tanh" / "2_norm_bound_crown"
    names = {"certified_bound.csv", "run.json", "radius_histogram.png", "certified_fraction.png"}
    assert {path.name for path in folder.iterdir()} == names
    record = read_record(folder)
    assert record["status"] == "finished"
    assert record["counts"] == {"drawn": IMAGES, "left_out": 0, "misclassified": 2, "kept": IMAGES - 2}
    assert record["arguments"]["N"] == IMAGES and record["data"]["source"] == "mnist"
    rows = read_bound_rows(folder / "certified_bound.csv")
    radii = [row.radius for row in rows]
    assert record["summary"]["mean"] == pytest.approx(np.mean(radii), rel=1e-12)
    assert record["summary"]["std"] == pytest.approx(np.std(radii), rel=1e-9)
    assert (record["summary"]["min"], record["summary"]["max"]) == (min(radii), max(radii))


CASES = {
    "2_norm_bound_crown": (),
    "1_norm_bound_crown": ("--p", 1),
    "inf_norm_bound_crown": ("--p", "inf"),
    "2_norm_bound_untargeted_crown": ("--untargeted",),
    "2_norm_bound_target_runnerup_crown": ("--target", "runnerup"),
    "2_norm_bound_target_least_crown": ("--target", "least"),
    "1_norm_bound_frames_1_3_crown": ("--p", 1, "--frames", 3, 1),
    "2_norm_bound_untargeted_sequence_crown": ("--untargeted", "--ball", "sequence"),
    "inf_norm_bound_clip_ibp": ("--p", "inf", "--clip", "--method", "ibp"),
    "1_norm_bound_clip_crown": ("--p", 1, "--clip"),
    "2_norm_bound_crown-ibp": ("--method", "crown-ibp"),
}


@pytest.mark.parametrize("name", CASES)
def test_radii_are_those_of_the_python_interface(finished, name):
    flags = CASES[name]
    outcome = finished.bound(*flags)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    rows = finished.rows(name)
    assert [(row.index, row.label) for row in rows] == [(row.index, row.label) for row in finished.rows()]
    assert all(row.prediction == row.label for row in rows)
    model, x, labels = finished.samples(rows)
    assert model(x).argmax(dim=1).tolist() == labels.tolist() == [row.label for row in rows]
    targets = None if "--untargeted" in flags else torch.tensor([row.target for row in rows])
    if "runnerup" in flags:
        assert targets.tolist() == model(x).topk(2, dim=1).indices[:, 1].tolist()
    if "least" in flags:
        assert targets.tolist() == model(x).argmin(dim=1).tolist()
    norm = float(flags[flags.index("--p") + 1]) if "--p" in flags else 2.0
    largest = x.shape[2] ** (1 / norm) * (2.0 if "sequence" in flags else 1.0)
    radius = certified_radius(
        model,
        x,
        labels,
        norm=norm,
        targets=targets,
        frames=[1, 3] if "--frames" in flags else None,
        clip=(0.0, 1.0) if "--clip" in flags else None,
        ball="sequence" if "sequence" in flags else "frame",
        method=flags[flags.index("--method") + 1] if "--method" in flags else "crown",
        tol=1e-3,
        max_eps=largest,
    )
    # Another batch size moves the last digits, and by them at most one step of the search.
    assert [row.radius for row in rows] == pytest.approx(radius.tolist(), rel=2e-3)
    for row in rows:
        assert 0 < row.radius < row.failed_eps and row.margin > 0
        assert row.radius == largest if row.failed_eps == INF else row.failed_eps <= row.radius * 1.0011


def test_counts_are_those_of_the_python_interface(finished):
    """p = 0, of the whole sequence by values and by frames, and at one number."""
    for name, flags, told in (
        ("0_norm_bound_sequence_crown", (), {}),
        ("0_norm_bound_sequence_frames_crown", ("--together", "frame"), {"together": "frame"}),
        ("0_norm_bound_sequence_k_1_crown", ("--k", 1), {"max_eps": 1}),
    ):
        outcome = finished.bound("--p", 0, "--ball", "sequence", *flags)
        assert outcome.code == 0 and "change to anything in [0, 1]" in outcome.out, outcome.err
        rows = finished.rows(name)
        model, x, labels = finished.samples(rows)
        told |= {
            "norm": 0,
            "ball": "sequence",
            "clip": (0.0, 1.0),
            "targets": torch.tensor([row.target for row in rows]),
        }
        counts = certified_radius(model, x, labels, **told).tolist()
        assert [row.radius for row in rows] == counts
        assert f"certified at 1 changes: {sum(count >= 1 for count in counts)} of {len(rows)}" in outcome.out


def test_per_frame_radii_and_heatmap(finished):
    name = "2_norm_bound_per_frame_crown"
    rows = finished.rows(name)
    assert [row.frame for row in rows] == list(range(FRAMES)) * (IMAGES - 2)
    assert (finished.folder(name) / "frame_heatmap.png").stat().st_size > 5000
    summary = read_record(finished.folder(name))["summary"]
    for frame in range(FRAMES):
        of_frame = [row for row in rows if row.frame == frame]
        model, x, labels = finished.samples(of_frame)
        targets = torch.tensor([row.target for row in of_frame])
        radius = certified_radius(model, x, labels, targets=targets, frames=frame, max_eps=x.shape[2] ** 0.5)
        assert [row.radius for row in of_frame] == pytest.approx(radius.tolist(), rel=2e-3)
        assert summary["frames"][frame]["mean"] == pytest.approx(radius.mean().item(), rel=2e-3)


def test_the_drawing_depends_on_the_seed_alone(copied):
    def drawn():
        return [(row.index, row.target) for row in copied.rows()]

    reference = drawn()
    for flags in (("--batch-size", 3), ("--dtype", "float32")):
        copied.bound(*flags)
        assert drawn() == reference
    assert_one_line(copied.bound("--N", 7), "--N was 12, now it is 7", "--overwrite", "--out-dir")
    assert drawn() == reference
    copied.bound("--N", 7, "--overwrite")
    assert drawn() == reference[: len(drawn())] and len(drawn()) >= 5
    copied.bound("--seed", 5, "--overwrite")
    assert drawn() != reference


def test_samples_of_the_target_class_are_left_out_and_counted(copied):
    target = copied.rows()[0].label
    outcome = copied.bound("--target", target)
    assert outcome.code == 0
    labels = load_mnist(copied.data).test_y.tolist()
    counts = read_record(copied.folder(f"2_norm_bound_target_{target}_crown"))["counts"]
    assert counts["left_out"] == labels.count(target) > 0
    assert sum(counts[name] for name in ("left_out", "misclassified", "kept")) == IMAGES
    assert f"{counts['left_out']} drawn images of class {target} are left out" in outcome.out
    assert all(row.label != target == row.target for row in copied.rows(f"2_norm_bound_target_{target}_crown"))


@pytest.mark.parametrize("flags", [(), ("--per-frame",)], ids=["sample", "per-frame"])
def test_resumed_after_an_end_anywhere_the_rows_are_the_same(copied, flags):
    folder = copied.folder("2_norm_bound" + "_per_frame" * bool(flags) + "_crown")
    path, record = folder / "certified_bound.csv", read_record(folder)
    whole, reference = path.read_bytes(), without_seconds(path)
    header = whole.index(b"\n") + 1
    sizes = {header + 3, len(whole) // 2, len(whole) - 1} | ({0, 5, header, len(whole) // 3} if not flags else set())
    for size in sizes:
        (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
        path.write_bytes(whole[:size])
        outcome = copied.bound(*flags, "--resume")
        assert outcome.code == 0 and "resuming" in outcome.out, outcome.err
        kept = max(header, whole[:size].rfind(b"\n") + 1)
        assert path.read_bytes()[:kept] == whole[:kept]  # seconds included: not searched again
        assert without_seconds(path) == reference
        assert read_record(folder)["status"] == "finished"
    before = path.read_bytes(), (folder / "run.json").read_bytes()
    assert copied.bound(*flags, "--resume").code == 0
    assert (path.read_bytes(), (folder / "run.json").read_bytes()) == before


def test_an_interruption_keeps_finished_batches_and_earlier_results(copied):
    reference = without_seconds(copied.folder() / "certified_bound.csv")
    before = snapshot(copied.work)
    search, calls = Run.search, []

    def interrupted(run, *arguments, **options):
        calls.append(arguments)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return search(run, *arguments, **options)

    for allowed, rows in ((0, IMAGES - 2), (2, 8)):
        calls.clear()
        with mock.patch.object(Run, "search", interrupted):
            outcome = copied.bound()
        assert outcome.code == 130 and "--resume continues" in outcome.err
        assert len(copied.rows()) == rows
        if allowed == 0:
            assert snapshot(copied.work) == before
    assert read_record(copied.folder())["status"] == "running"
    assert without_seconds(copied.folder() / "certified_bound.csv") == reference[:9]
    calls.clear()
    allowed = 1  # of three batches, the last is missing
    with mock.patch.object(Run, "search", interrupted):
        assert copied.bound("--resume").code == 0
    assert without_seconds(copied.folder() / "certified_bound.csv") == reference
    assert [part["rows"] for part in read_record(copied.folder())["resumed"]] == [8]


def test_another_run_is_not_resumed(copied):
    before = snapshot(copied.work)
    for flag, value in (("--tol", 0.01), ("--seed", 1), ("--batch-size", 3), ("--eps0", 0.5), ("--N", 10)):
        assert_one_line(copied.bound("--resume", flag, value), "cannot resume", flag)
    assert snapshot(copied.work) == before
    model, config = load_checkpoint(copied.checkpoint)
    save_checkpoint(copied.checkpoint, model, config | {"note": "another one"})
    assert_one_line(copied.bound("--resume"), "cannot resume", "sha256")


def damage_nan(place: Place) -> None:
    content = torch.load(place.checkpoint, weights_only=True)
    content["state_dict"]["weight_hh_l0"][0, 0] = torch.nan
    torch.save(content, place.checkpoint)


def other_model(place: Place, **changes) -> None:
    """Put a model of another kind where the flags expect the usual one."""
    made = make_checkpoint(place.work.parent / "others", changes.pop("architecture", "rnn"), **changes)
    shutil.copy(made, place.checkpoint)


BAD = {
    "p = 3": (("--p", 3), None, ["3", "1, 2 or inf"]),
    "N = 0": (("--N", 0), None, ["--N"]),
    "N too large": (("--N", 13), None, ["--N 13", "12 test images"]),
    "clip of counted changes": (("--p", 0, "--clip"), None, ["--p 0", "leave out --clip"]),
    "changes in another norm": (("--k", 2), None, ["--k", "needs --p 0"]),
    "a frame as a change of a frame": (
        ("--p", 0, "--together", "frame"),
        None,
        ["--together frame", "--ball sequence"],
    ),
    "curves of counted changes": (("--p", 0, "--method", "curve"), None, ["--p 0 is for --method crown", "not curve"]),
    "certificate of cut balls": (("--clip", "--save-certificate"), None, ["--save-certificate", "--clip"]),
    "target and untargeted": (("--untargeted", "--target", "least"), None, ["--untargeted"]),
    "no such target": (("--target", 10), None, ["--target 10"]),
    "target is no number": (("--target", "worst"), None, ["--target"]),
    "frames and per-frame": (("--per-frame", "--frames", 1), None, ["--frames"]),
    "no such frame": (("--frames", 4), None, ["0 to 3"]),
    "alpha steps of crown": (("--alpha-steps", 20), None, ["--alpha-steps has no effect", "--method crown", "alpha"]),
    "curve steps of alpha": (("--method", "alpha", "--curve-steps", 3), None, ["--curve-steps", "curve, bab"]),
    "time limit of curve": (("--method", "curve", "--time-limit", 3), None, ["--time-limit", "is for bab"]),
    "one ball a frame": (("--per-frame", "--ball", "sequence"), None, ["--ball sequence"]),
    "ball of one frame": (("--frames", 1, 1, "--ball", "sequence"), None, ["--ball sequence"]),
    "tol": (("--tol", 1), None, ["--tol"]),
    "eps0": (("--eps0", 0), None, ["--eps0"]),
    "unknown flag": (("--epz0", 1), None, ["--epz0"]),
    "unknown method": (("--method", "sideways"), None, ["--method"]),
    "T does not divide 28": (("--time-step", 5), None, ["5 frames do not divide"]),
    "no MNIST": (("--data-dir", "nowhere"), None, ["no MNIST"]),
    "wrong hidden size": (("--hidden-size", 8), None, ["no checkpoint", "train it by"]),
    "missing": ((), lambda place: place.checkpoint.unlink(), ["no checkpoint"]),
    "corrupt": ((), lambda place: place.checkpoint.write_bytes(b"PK" + bytes(50)), ["damaged"]),
    "foreign": ((), lambda place: torch.save([1, 2], place.checkpoint), ["not a checkpoint"]),
    "NaN": ((), damage_nan, ["weight_hh_l0", "NaN"]),
    "other hidden size": ((), lambda place: other_model(place, hidden_size=5), ["hidden_size = 5", "says 4"]),
    "other activation": ((), lambda place: other_model(place, activation="relu"), ["activation = relu"]),
    "other cell": ((), lambda place: other_model(place, architecture="gru"), ["gru", "not rnn"]),
    "other layers": ((), lambda place: other_model(place, num_layers=2), ["num_layers = 2"]),
    "other direction": ((), lambda place: other_model(place, bidirectional=True), ["bidirectional = True"]),
    "other inputs": ((), lambda place: other_model(place, input_size=3), ["no MNIST classifier"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_earlier_results(copied, case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags, prepare, words = BAD[case]
    if prepare is not None:
        prepare(copied)
    before = snapshot(copied.work)
    outcome = copied.bound(*flags)
    assert_one_line(outcome, *words)
    assert snapshot(copied.work) == before


def test_a_folder_that_cannot_be_written_is_one_line(copied):
    shutil.rmtree(copied.folder())
    copied.folder().write_text("in the way")
    before = snapshot(copied.work)
    assert_one_line(copied.bound(), "2_norm_bound_crown")
    assert snapshot(copied.work) == before


def test_numbers_that_overflow_are_one_line(copied, tmp_path):
    content = torch.load(copied.checkpoint, weights_only=True)
    content["state_dict"]["weight_ih_l0"] *= 1e37
    torch.save(content, copied.checkpoint)
    copied.data = make_data(tmp_path / "data", copied.checkpoint)
    before = snapshot(copied.work)
    assert_one_line(copied.bound("--overwrite"), "NaN")
    assert snapshot(copied.work) == before


def test_dry_run_writes_nothing(copied):
    before = snapshot(copied.work)
    outcome = copied.bound("--dry-run", "--target", "least", "--p", 1)
    assert outcome.code == 0 and "dry run" in outcome.out
    assert snapshot(copied.work) == before and not copied.folder("1_norm_bound_target_least_crown").exists()


def test_no_perturbation_of_a_constant_model_is_too_large(tmp_path):
    place = make_place(tmp_path)
    model, config = load_checkpoint(place.checkpoint)
    torch.nn.init.zeros_(model.rnn.weight_ih_l0)
    save_checkpoint(place.checkpoint, model, config)
    make_labels = torch.full((IMAGES,), int(model(torch.zeros(1, FRAMES, 784 // FRAMES)).argmax()))
    write_idx(place.data / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", make_labels.numpy())
    for flags, name, largest in (
        ((), "2_norm_bound_crown", 14.0),
        (("--p", "inf"), "inf_norm_bound_crown", 1.0),
        (("--ball", "sequence"), "2_norm_bound_sequence_crown", 28.0),
        (("--p", 1, "--per-frame"), "1_norm_bound_per_frame_crown", 196.0),
    ):
        assert place.bound(*flags).code == 0
        assert all((row.radius, row.failed_eps) == (largest, INF) for row in place.rows(name))
        assert read_record(place.folder(name))["summary"]["max"] == largest


def test_every_kind_of_run_has_its_own_folder():
    choices = {
        "p": (1.0, 2.0, INF),
        "goal": ((True, None), (False, "random"), (False, "least"), (False, "runnerup"), (False, 0), (False, 3)),
        "per_frame": (False, True),
        "frames": (None, [0], [0, 3], [3]),
        "ball": ("frame", "sequence"),
        "clip": (False, True),
        "method": ("crown", "ibp", "crown-ibp"),
        "relaxation": ("plane", "line", "constant"),
    }
    names = {}  # the relaxation has no effect on intervals
    for values in itertools.product(*choices.values()):
        arguments = dict(zip(choices, values, strict=True))
        arguments["untargeted"], arguments["target"] = arguments.pop("goal")
        kind = str(values if arguments["method"] != "ibp" else values[:-1])
        names.setdefault(kind, set()).add(result_folder_name(Namespace(**arguments)))
    assert all(len(own) == 1 for own in names.values())
    assert len(set.union(*names.values())) == len(names)
    assert all({"crown", "ibp", "crown-ibp"} & set(own.split("_")) for own in set.union(*names.values()))


def test_runs_of_a_folder_without_the_defaults_names_are_resumed_there(copied):
    new, former = copied.folder(), copied.folder("2_norm_bound")
    rows = without_seconds(new / "certified_bound.csv")
    new.rename(former)
    outcome = copied.bound("--resume")
    assert outcome.code == 0 and str(former) in outcome.out and not new.exists()
    assert without_seconds(former / "certified_bound.csv") == rows
    assert copied.bound().code == 0 and without_seconds(new / "certified_bound.csv") == rows
    outcome = copied.bound("--resume")
    assert outcome.code == 0 and str(new) in outcome.out


def test_balls_are_refused(place):
    assert_one_line(place.bound("--method", "ball", "--save-certificate"), "--method ball is for feed-forward networks")


def test_layers_and_directions(tmp_path):
    place = make_place(tmp_path, num_layers=2, bidirectional=True)
    assert_one_line(place.bound(), "no checkpoint")
    assert place.bound("--num-layers", 2, "--bidirectional").code == 0
    assert len(place.rows()) == IMAGES - 2


@pytest.mark.parametrize("architecture", ["lstm", "gru"])
def test_cells_with_gates(tmp_path, architecture):
    place = make_place(tmp_path, architecture)
    for relaxation in ("plane", "line", "constant"):
        outcome = place.bound("--relaxation", relaxation, "--N", 4, "--tol", 0.05)
        assert outcome.code == 0 and outcome.err == "", outcome.err
    mean = {
        name: np.mean([row.radius for row in place.rows(f"2_norm_bound_crown_{name}")])
        for name in ("plane", "line", "constant")
    }
    assert mean["plane"] > mean["line"] > mean["constant"] > 0
    assert place.bound("--per-frame", "--p", "inf", "--clip", "--untargeted", "--N", 4).code == 0
    frames = place.rows("inf_norm_bound_untargeted_per_frame_clip_crown_plane")
    assert len(frames) == FRAMES * len(place.rows("2_norm_bound_crown_plane"))
    assert_one_line(place.bound("--relaxation", "cube"), "--relaxation")
    for relaxation in ("volume", "plane"):
        flags = ("--method", "ibp", "--relaxation", relaxation)
        assert_one_line(
            place.bound(*flags),
            "--relaxation has no effect",
            "crown, crown-ibp, forward, forward-backward, alpha, curve, bab",
        )
    stacked = make_place(tmp_path / "stacked", architecture, num_layers=2, bidirectional=True)
    assert stacked.bound("--num-layers", 2, "--bidirectional", "--method", "ibp").code == 0
    assert len(stacked.rows("2_norm_bound_ibp")) == IMAGES - 2


def test_an_edited_script_answers_another_question(place, tmp_path):
    """docs/extending.md: the second half of the frames, images of one class, by two lines; all that is said follows."""
    text = (ROOT / SCRIPTS["rnn"]).read_text()
    assert place.bound("--out-dir", tmp_path / "all").code == 0
    label = read_bound_rows(tmp_path / "all" / "certified_bound.csv")[0].label
    changes = {
        "    args = get_args()\n": "    args.frames = list(range(args.time_step // 2, args.time_step))\n",
        "        samples = draw_samples(data, model, args)\n": (
            f"        samples = samples.where(samples.labels == {label})\n"
        ),
    }
    for line, more in changes.items():
        assert text.count(line) == 1
        text = text.replace(line, line + more)
    (tmp_path / "edited.py").write_text(text)
    flags = ("--work-dir", place.work, "--data-dir", place.data, "--N", IMAGES, "--threads", 1, *SIZES)
    outcome = call(tmp_path / "edited.py", *flags, "--out-dir", tmp_path / "half")
    assert outcome.code == 0 and f"frames 2, 3 of {FRAMES}" in outcome.out, outcome
    rows = read_bound_rows(tmp_path / "half" / "certified_bound.csv")
    assert rows and {row.label for row in rows} == {label}
    model, x, labels = place.samples(rows)
    targets = torch.tensor([row.target for row in rows])
    expected = certified_radius(model, x, labels, targets=targets, frames=[2, 3])
    assert [row.radius for row in rows] == pytest.approx(expected.tolist(), rel=2e-3)
