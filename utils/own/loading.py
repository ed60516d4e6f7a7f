"""Models and arrays from a user's files."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.checkpoint import load_weights
from ..network.constants.extra import NOTHING, Extra
from ..network.onnx_graph import read_onnx
from .arguments import ONNX_ENDS


def load_model(name: str, weights: Path | None = None) -> nn.Module | Graph:
    """The model of ``file.py:Name`` or of an ONNX file, in evaluation mode.

    ``Name`` is a module, or a class or function that gives one without arguments. The file is run, as an import does.

    Raises:
        ValueError: there is no such model, or the weights are another's.
    """
    if name.endswith(ONNX_ENDS):
        if weights is not None:
            raise ValueError("--weights are those of a Python model: an ONNX file has its own")
        return read_onnx(name).graph
    file, colon, attribute = name.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not attribute.isidentifier():
        raise ValueError(f"--model is FILE.py:NAME or FILE.onnx, not {name!r}")
    if not path.is_file():
        raise ValueError(f"--model: there is no file {path}")
    model = getattr(_imported(path), attribute, None)
    if model is None:
        raise ValueError(f"--model: {path} has no {attribute}")
    if not isinstance(model, nn.Module):
        model = _called(model, f"{path}:{attribute}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _imported(path: Path):
    """The file as a module of its own name, beside its neighbours."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _called(make, where: str) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"{where} cannot be called without arguments: {error}; give a function that can") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where} gives a {type(model).__name__}, no nn.Module")
    return model


def load_own(
    args: argparse.Namespace, name: str, device: torch.device
) -> tuple[nn.Module | Graph, Tensor, Tensor | None, Extra]:
    """A model, and of --data, --labels and --extra the first --N: inputs in the model's precision, classes, constants.

    Raises:
        ValueError: a file does not hold what it should.
    """
    model, like = load_model(name, args.weights), torch.float64
    if not isinstance(model, Graph):
        model = model.to(device)
        like = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x, labels = _load_inputs(args, like)
    extra = _load_extra(args, len(x), like, device)
    if isinstance(model, Graph):
        if extra:
            raise ValueError("--extra is what a Python model's forward is given: an ONNX file has its own constants")
        frames = model.frames
        x = x.to(like).reshape(len(x), len(frames), frames[0].size)
    return model, x.to(device), None if labels is None else labels.to(device), extra


def _load_inputs(args: argparse.Namespace, like: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Inputs and classes; floats in the model's precision, whole numbers as words."""
    x = load_array(args.data, "--data")[: args.N]
    labels = None if args.labels is None else load_array(args.labels, "--labels").long()[: args.N]
    if args.shape:
        if x[0].numel() != torch.Size(args.shape).numel():
            raise ValueError(f"--shape {args.shape} does not fit inputs of {x[0].numel()} values")
        x = x.reshape(len(x), *args.shape)
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(f"--data must hold (batch, ...), not {tuple(x.shape)}")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"--labels holds {len(labels)} classes, --data {len(x)} inputs")
    return (x.to(like) if x.is_floating_point() else x.long()), labels


def _load_extra(args: argparse.Namespace, count: int, like: torch.dtype, device: torch.device) -> Extra:
    """What --extra holds for the first inputs: one array by its place, several by their names."""
    if args.extra is None:
        return NOTHING
    every = len(load_array(args.data, "--data"))

    def usable(value: Tensor) -> Tensor:
        return value.to(device, like) if value.is_floating_point() else value.to(device)

    found = load_arrays(args.extra, "--extra")
    found = usable(found) if isinstance(found, Tensor) else {name: usable(value) for name, value in found.items()}
    return Extra.of(found, every).part(slice(0, count))


def load_array(name: str, flag: str) -> Tensor:
    """Numbers of a .npy, .npz, .csv, .txt or torch file; ``FILE:KEY`` of a file that holds several arrays.

    Raises:
        ValueError: there is no such file or key, or it holds no numbers.
    """
    found = load_arrays(name, flag)
    if isinstance(found, Tensor):
        return found
    if len(found) > 1:
        raise ValueError(f"{flag}: {name} holds {', '.join(found)}: say which, as FILE:KEY")
    return next(iter(found.values()))


def load_arrays(name: str, flag: str) -> Tensor | dict[str, Tensor]:
    """What a file holds, likewise: one array, or, without a KEY, several by their names."""
    path, key = Path(name), None
    if not path.exists() and ":" in name:
        file, _, key = name.rpartition(":")
        path = Path(file)
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}")
    try:
        value = _read(path)
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        raise ValueError(f"{flag}: {path} cannot be read: {error}") from error
    if isinstance(value, dict) and key is None and value:
        return {str(name): _numbers(one, f"{flag}: {path}") for name, one in value.items()}
    if isinstance(value, dict):
        if key not in value:
            raise ValueError(f"{flag}: {path} holds {', '.join(map(str, value))}: say which, as FILE:KEY")
        value = value[key]
    elif key is not None:
        raise ValueError(f"{flag}: {path} holds one array: leave out :{key}")
    return _numbers(value, f"{flag}: {path}")


def _numbers(value, where: str) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.is_complex() or tensor.dtype == torch.bool or not bool(tensor.isfinite().all()):
        raise ValueError(f"{where} must hold finite numbers")
    return tensor


def _read(path: Path):
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if path.suffix in (".csv", ".txt"):
        return _read_text(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_text(path: Path) -> np.ndarray:
    """Numbers with commas or spaces between; a first line of words is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comma = "," if any("," in line for line in lines) else None
    try:
        [float(word) for word in lines[0].split(comma)]
    except ValueError:
        lines = lines[1:]
    table = np.loadtxt(lines, delimiter=comma, ndmin=1)
    return table.astype(np.int64) if table.ndim == 1 and (table == table.astype(np.int64)).all() else table
