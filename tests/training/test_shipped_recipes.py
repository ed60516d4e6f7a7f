"""The commands of scripts/train_certified.py are those by which the committed models were trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mnist_files import ROOT

from utils.experiments.table_arguments import MODELS_DIR, RECURRENT, is_certified
from utils.network.checkpoint import load_checkpoint, model_name
from utils.training.certified.arguments import recipe_facts, recipe_of
from utils.training.narrow import shares_of

KINDS = (*RECURRENT, "cnn")


def module_of(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = module_of("scripts/train_certified.py").commands(Path("nowhere"))


def differences(command: list[str], config: dict, monkeypatch) -> list[str]:
    """What a checkpoint's config says otherwise than a training command."""
    monkeypatch.setattr(sys, "argv", command)
    args, cnn = module_of(command[0]).get_args(), config["architecture"] == "cnn"
    recipe = recipe_of(args, 1, input_penalty=0.0) if cnn else recipe_of(args, args.time_step)
    told = recipe_facts(recipe)
    facts = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    known = config["certified"] | {name: config[name] for name in facts}
    if "hidden_size" in config:
        known |= {"hidden_size": config["hidden_size"], "narrowed": config.get("narrowed")}
        narrowed = {"from": args.start_size, "shares": list(shares_of(args))} if args.start_size else None
        facts |= {"hidden_size": args.hidden_size, "narrowed": narrowed}
    told = told["certified"] | facts
    return [name for name in known if told[name] != known[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_committed_model_was_trained_by_its_command(name, monkeypatch):
    command = COMMANDS[name]
    (path,) = (path for path in (MODELS_DIR / name).iterdir() if path.name in KINDS)
    _, config = load_checkpoint(path)
    assert model_name(config) == name
    if "--" in command:
        best = module_of(command[0])
        args = best.get_args(command[1:])
        starts = [own for _, own in best.start_commands(args)]
        start = next(own for own in starts if own[own.index("--seed") + 1] == str(config["started_from"]["seed"]))
        assert differences(start, {"architecture": "rnn"} | config["started_from"], monkeypatch) == []
        command = best.last_command(args, "start")
    assert differences(command, config, monkeypatch) == []
    changed = [*command, "--overshoot", "1.7", "--epochs", "7"]
    assert differences(changed, config, monkeypatch) == ["overshoot", "epochs"]


def test_a_seed_is_that_of_all_starts():
    script = module_of("scripts/train_certified.py")
    name = "rnn_7_64_tanh_ibp_inf_0.1"
    told = script.with_flags(COMMANDS[name], Path("there"), ["--seed", "2", "--threads", "1"])
    best = module_of(told[0])
    args = best.get_args(told[1:])
    assert (args.seed, args.starts, args.save_dir) == (2, 6, Path("there"))
    assert all(own.count("--threads") == 1 for _, own in best.start_commands(args))
    plain = script.with_flags(COMMANDS["lstm_7_64_ibp_inf_0.1"], Path("there"), ["--seed", "2"])
    assert plain[-5:] == ["--save-dir", "there", "--resume", "--seed", "2"]


def test_every_model_of_certified_training_has_a_command():
    folders = {path.parent.name for path in MODELS_DIR.glob("*/*") if path.name in KINDS}
    assert {name for name in folders if is_certified(name)} == set(COMMANDS)
