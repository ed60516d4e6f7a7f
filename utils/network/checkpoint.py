"""Checkpoints: plain torch files {"config", "state_dict"} with everything needed to rebuild a classifier.

The state dict has the names of a stock ``nn.RNN``/``nn.LSTM``/``nn.GRU`` (``weight_ih_l0`` ...) and ``head.weight``,
``head.bias``. The config holds plain Python values; ``CONFIG_KEYS`` are the ones that a model is built from, further
ones (accuracy, seed, versions ...) tell where it comes from.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cnn import ALWAYS_NORMALISED, CNN_KINDS, ImageClassifier, make_cnn
from .models import MLP, MLP_ACTIVATIONS, POOLINGS, SequenceClassifier
from .speech import MelFeatures, SpeechClassifier, check_features
from .transformer import TRANSFORMER_KEYS, SequenceTransformer, check_transformer, make_transformer

ARCHITECTURES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
ACTIVATIONS = ("tanh", "relu")
SIZES = ("input_size", "num_frames", "hidden_size", "num_layers", "num_classes")
FLAGS = ("bidirectional", "bias")
STATE_NAMES = ("state_dict", "model_state_dict", "model")  # under which tables hold them
HALF = (torch.float16, torch.bfloat16)
KEYS_SHOWN = 4
CONFIG_KEYS = ("architecture", *SIZES, *FLAGS, "activation", "pooling", "input_mean", "input_std")
MLP_KEYS = ("architecture", "input_size", "layers", "num_classes", "activation", "leaky_slope")
CNN_SIZES = ("width", "channels", "size", "num_classes")
CNN_KEYS = ("architecture", "kind", "batch_norm", *CNN_SIZES, "input_mean", "input_std")
KEYS = {"mlp": MLP_KEYS, "cnn": CNN_KEYS, "transformer": TRANSFORMER_KEYS}  # of other architectures: CONFIG_KEYS
# One of them is in every state dict of bare models.
FIRST_NAMES = ("head.weight", "weight_ih_l0", "rnn.weight_ih_l0", "layers.0.weight", "layers.0.0.weight")
COUNTER = "num_batches_tracked"  # of normalisation: the one weight that is no floating-point number
FOLDER_NAME = re.compile(
    r"(?P<architecture>rnn|lstm|gru)_(?P<frames>\d+)_(?P<hidden>\d+)"
    r"(_(?P<activation>tanh|relu))?(_(?P<layers>\d+)layer)?(?P<bidirectional>_bi)?"
)

MLP_FOLDER_NAME = re.compile(
    r"mlp_(?P<layers>\d+(_\d+)*)_(?P<kind>[a-z]+)(?P<lipschitz>_lipschitz)?(?P<weights>_weights)?"
)

CNN_FOLDER_NAME = re.compile(rf"cnn_(?P<kind>{'|'.join(CNN_KINDS)})_(?P<width>\d+)(?P<norm>_bn)?(_(?P<recipe>.+))?")

Config = dict[str, Any]
Classifier = SequenceClassifier | MLP | ImageClassifier | SequenceTransformer


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file."""


def model_name(config: Config) -> str:
    """Folder name of a model: rnn_7_64_tanh, lstm_4_32, lstm_7_32_2layer, gru_7_64_bi, mlp_20_20_relu, cnn_small_16 ...

    That of certified training ends with the recipe's name: lstm_7_64_ibp_inf_0.1.
    """
    if config["architecture"] == "mlp":
        recipe = ["lipschitz"] if config.get("lipschitz_weight") else [config["recipe"]] if config.get("recipe") else []
        recipe += ["weights"] if config.get("perturb") else []
        return "_".join(["mlp", *map(str, config["layers"]), config["activation"], *recipe])
    if config["architecture"] == "cnn":
        chosen = config["batch_norm"] and config["kind"] not in ALWAYS_NORMALISED
        words = ["cnn", config["kind"], str(config["width"]), *["bn"] * chosen]
        return "_".join([*words, *filter(None, [config.get("recipe")])])
    name = f"{config['architecture']}_{config['num_frames']}_{config['hidden_size']}"
    if config["architecture"] == "rnn":
        name += f"_{config['activation']}"
    if config["num_layers"] != 1:
        name += f"_{config['num_layers']}layer"
    name += "_bi" * config["bidirectional"] + "_mean" * (config["pooling"] == "mean")
    return name + (f"_{config['recipe']}" if config.get("recipe") else "")


def build_model(config: Config, dtype: torch.dtype = torch.float32) -> Classifier:
    """An untrained classifier (torch's random initial weights) of the size and kind that config describes.

    Raises:
        ValueError: a key is missing or its value makes no model.
    """
    check_config(config)
    if config["architecture"] == "mlp":
        sizes = (config["input_size"], *config["layers"], config["num_classes"])
        return MLP(sizes, config["activation"], config["leaky_slope"], dtype)
    if config["architecture"] == "cnn":
        sizes = (config[key] for key in ("channels", "size", "num_classes", "width"))
        statistics = config["input_mean"], config["input_std"]
        return make_cnn(config["kind"], *sizes, config["batch_norm"], *statistics).to(dtype)
    if config["architecture"] == "transformer":
        return make_transformer(config).to(dtype)
    kind = ARCHITECTURES[config["architecture"]]
    nonlinearity = {"nonlinearity": config["activation"]} if config["architecture"] == "rnn" else {}
    rnn = kind(
        config["input_size"],
        config["hidden_size"],
        config["num_layers"],
        bias=config["bias"],
        bidirectional=config["bidirectional"],
        batch_first=True,
        dtype=dtype,
        **nonlinearity,
    )
    width = config["hidden_size"] * (2 if config["bidirectional"] else 1)
    head = nn.Linear(width, config["num_classes"], dtype=dtype)
    statistics = {"mean": _statistic(config["input_mean"]), "std": _statistic(config["input_std"])}
    if config.get("features"):
        features = MelFeatures(**config["features"])
        return SpeechClassifier(features, rnn, head, pooling=config["pooling"], **statistics)
    return SequenceClassifier(rnn, head, pooling=config["pooling"], **statistics)


def check_config(config: Config) -> None:
    """Raise ValueError, naming the key, if config does not describe a model."""
    architecture = config.get("architecture")
    missing = [key for key in KEYS.get(architecture, CONFIG_KEYS) if key not in config]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    if architecture == "mlp":
        return _check_mlp(config)
    if architecture == "cnn":
        _check_values(config, CNN_SIZES, ("batch_norm",), {"kind": CNN_KINDS})
        return _check_normalisation(config, "channels")
    if architecture == "transformer":
        return check_transformer(config)
    activations = ACTIVATIONS if architecture == "rnn" else (None,)
    known = {"architecture": tuple(ARCHITECTURES), "activation": activations, "pooling": POOLINGS}
    _check_values(config, SIZES, FLAGS, known)
    _check_normalisation(config, "input_size")
    if config.get("features"):
        check_features(config["features"], config["input_size"])


def _check_values(config: Config, sizes: Iterable[str], flags: Iterable[str], known: dict[str, tuple]) -> None:
    for key in sizes:
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key} in the config must be a positive integer, not {config[key]!r}")
    for key in flags:
        if type(config[key]) is not bool:
            raise ValueError(f"{key} in the config must be True or False, not {config[key]!r}")
    for key, values in known.items():
        if config[key] not in values:
            raise ValueError(f"{key} in the config must be one of {values}, not {config[key]!r}")


def _check_mlp(config: Config) -> None:
    sizes = config["layers"] if isinstance(config["layers"], (list, tuple)) else [None]
    for key, values in (("layers", sizes), *((key, [config[key]]) for key in ("input_size", "num_classes"))):
        if not all(type(value) is int and value > 0 for value in values):
            raise ValueError(f"{key} in the config must be positive integers, not {config[key]!r}")
    if config["activation"] not in MLP_ACTIVATIONS:
        known = ", ".join(MLP_ACTIVATIONS)
        raise ValueError(f"activation in the config must be one of {known}, not {config['activation']!r}")
    slope = config["leaky_slope"]
    if type(slope) not in (int, float) or not 0 <= slope < math.inf:
        raise ValueError(f"leaky_slope in the config must be a number of at least 0, not {slope!r}")


def _check_normalisation(config: Config, size: str) -> None:
    for key in ("input_mean", "input_std"):
        values = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
        numbers = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not numbers or len(values) not in (1, config[size]) or (key == "input_std" and min(values) <= 0):
            raise ValueError(f"{key} in the config must be a number or one per input or channel, a std above 0")


def _statistic(value: float | list[float]) -> float | Tensor:
    return torch.tensor(value) if isinstance(value, (list, tuple)) else value


def save_checkpoint(path: str | Path, model: Classifier, config: Config) -> None:
    """Write model and config to path, whole or not at all, so that an interruption leaves the earlier file.

    Raises:
        ValueError: the config does not describe the model.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    check_config(config)
    state = {key.removeprefix("rnn."): value.detach().cpu().clone() for key, value in model.state_dict().items()}
    problem = _shape_problem(state, config)
    if problem:
        raise ValueError(f"the config does not describe the model: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        torch.save({"config": dict(config), "state_dict": state}, temporary)
        os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[Classifier, Config]:
    """The classifier, in evaluation mode, and the config of a checkpoint. Leaves torch's random state alone.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint of this project, does not fit its own
            config, or holds weights that are NaN or infinite.
    """
    path = Path(path)
    config, state = _parts(_read(path), path)
    try:
        check_config(config)
    except ValueError as error:
        raise CheckpointError(f"{path} is not usable: {error}") from error
    problem = _shape_problem(state, config) or _value_problem(state)
    if problem:
        raise CheckpointError(f"{path} is not usable: {problem}")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, next(iter(state.values())).dtype)
    model.load_state_dict(dict(state))
    return model.to(device).eval(), config


def missing(path: Path, advice: str) -> CheckpointError:
    """That there is no such file: what lies beside it, or else how it is made."""
    folder = path.parent
    beside = sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
    models = [name for name in beside if Path(name).suffix not in (".png", ".json", ".csv", ".html")]
    if models:
        return CheckpointError(f"there is no checkpoint {path}: the models of that folder are {', '.join(models)}")
    return CheckpointError(f"there is no checkpoint {path}: {advice}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file or a torch file, there on its own or in a table such as Lightning's.

    Raises:
        CheckpointError: it holds none, or safetensors is not installed.
    """
    state = _state_of(_read(path))
    if state is None:
        raise CheckpointError(f"{path} holds no state dict: save one by torch.save(model.state_dict(), ...)")
    return state


def _state_of(content: object) -> dict[str, Tensor] | None:
    if isinstance(content, dict) and content and _are_weights(content):
        return content
    nested = content if isinstance(content, dict) else {}
    names = [name for name in STATE_NAMES if name in nested] or list(nested)
    found = [state for state in map(_state_of, (nested[name] for name in names)) if state is not None]
    return found[0] if len(found) == 1 else None


def _are_weights(table: dict) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in table.items())


def plain_names(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The weights under the names of the bare model: without what DataParallel, compile or an outer module put before.

    In single precision, if they are in half.
    """
    wanted = set(wanted)
    while state and not wanted & set(state):
        first = {key.partition(".")[0] for key in state}
        if len(first) > 1 or any("." not in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    return {key: value.float() if value.dtype in HALF else value for key, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill the model from a file's state dict. Raises CheckpointError that names the keys if it is another's."""
    wanted = set(model.state_dict())
    stock = {key.removeprefix("rnn.") for key in wanted}
    state = plain_names(read_weights(path), wanted | stock)
    keys = {key if key in wanted else f"rnn.{key}" for key in state}
    if keys != wanted:
        found, needed = (", ".join(sorted(names)[:KEYS_SHOWN]) for names in (set(state), wanted))
        raise CheckpointError(f"{path} holds weights of another model: found {found} ..., needed {needed} ...")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        shapes = " ".join(str(error).split("\n", 1)[-1].split())
        raise CheckpointError(f"{path} holds weights of another size: {shapes}") from None


def _read(path: Path) -> object:
    if not path.exists():
        raise missing(path, train_command(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        raise CheckpointError(
            f"{path} is damaged or is not a plain torch checkpoint ({type(error).__name__}): of a whole module, or of "
            "Lightning's with objects in it, save the state_dict()"
        ) from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"to read {path} install safetensors, or save it by torch.save") from None
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({type(error).__name__})") from error


def _parts(content: object, path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config and state dict of what a file holds. Raises CheckpointError that says what is missing."""
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds bare weights without a config: save it by utils.network.save_checkpoint, which adds one"
        )
    if not isinstance(content, dict) or not {"config", "state_dict"} <= set(content):
        found = f", and holds {', '.join(map(str, content))}" if isinstance(content, dict) and len(content) < 20 else ""
        raise CheckpointError(f"{path} is not a checkpoint of this project: it needs a config and a state_dict{found}")
    config, state = content["config"], content["state_dict"]
    tensors = isinstance(state, dict) and _are_weights(state)
    if not isinstance(config, dict) or not tensors:
        raise CheckpointError(f"{path} is not a checkpoint of this project: config and state_dict must be dicts")
    state = plain_names(state, FIRST_NAMES)
    return config, {key.removeprefix("rnn."): value for key, value in state.items()}


def _shape_problem(state: dict[str, Tensor], config: Config) -> str | None:
    """What is wrong with names and shapes of the weights, if they are to fill the model of config."""
    with torch.device("meta"):  # shapes only: a wrong size in the config must not cost memory
        model = build_model(config)
    expected = {key.removeprefix("rnn."): tuple(value.shape) for key, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            return f"the weights lack {name}: they hold {', '.join(sorted(state)[:KEYS_SHOWN])} ..."
        if tuple(state[name].shape) != shape:
            return f"{name} has shape {tuple(state[name].shape)}, the config makes it {shape}"
    unknown = sorted(set(state) - set(expected))
    return f"the config has no place for {unknown[0]}" if unknown else None


def _value_problem(state: dict[str, Tensor]) -> str | None:
    for name, value in state.items():
        if name.endswith(COUNTER):
            continue
        if not value.is_floating_point():
            return f"{name} is of type {value.dtype}, not floating point"
        if not torch.isfinite(value).all():
            return f"{name} contains NaN or infinite values"
    return None


def train_command(path: Path) -> str:
    """A sentence with the command that would train the model that path names, as far as the names tell."""
    known, of_mlp = FOLDER_NAME.fullmatch(path.parent.name), MLP_FOLDER_NAME.fullmatch(path.parent.name)
    if of_mlp:
        sizes = of_mlp["layers"].replace("_", " ")
        command = f"python mlp/train_mlp_mnist_classifier.py --layers {sizes} --activation {of_mlp['kind']}"
        command += " --dataset cifar10" * (path.parent.parent.name == "cifar10_classifier")
        command += " --perturb weights" * bool(of_mlp["weights"])
        return f"train it by {command}" + " --lipschitz-weight 0.3" * bool(of_mlp["lipschitz"])
    of_cnn = CNN_FOLDER_NAME.fullmatch(path.parent.name)
    if of_cnn:
        dataset = "cifar" if path.parent.parent.name == "cifar10_classifier" else "mnist"
        command = f"python cnn/train_cnn_{dataset}_classifier.py --model {of_cnn['kind']} --width {of_cnn['width']}"
        command += " --batch-norm" * bool(of_cnn["norm"])
        words = re.fullmatch(r"([a-z-]+)_([^_]+)_([^_]+)(_clip)?", of_cnn["recipe"] or "")
        return f"train it by {command}" + (
            f" --certified {words[1]} --p {words[2]} --train-eps {words[3]}" + " --clip" * bool(words[4])
            if words
            else ""
        )
    if known is None:
        return "train one by one of the train_*_classifier.py scripts, or check the path"
    architecture = known["architecture"]
    folder = "vanilla_rnn" if architecture == "rnn" else architecture
    command = f"python {folder}/train_{architecture}_mnist_classifier.py"
    command += f" --time-step {known['frames']} --hidden-size {known['hidden']}"
    command += f" --activation {known['activation']}" if known["activation"] else ""
    command += f" --num-layers {known['layers']}" if known["layers"] else ""
    return f"train it by {command}" + " --bidirectional" * bool(known["bidirectional"])
