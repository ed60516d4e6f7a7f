"""Models and arrays from a user's files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.checkpoint import load_weights
from ..network.onnx_graph import read_onnx

ONNX_ENDS = (".onnx", ".onnx.gz")


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


def load_array(name: str, flag: str) -> Tensor:
    """Numbers of a .npy, .npz, .csv, .txt or torch file; ``FILE:KEY`` of a file that holds several arrays.

    Raises:
        ValueError: there is no such file or key, or it holds no numbers.
    """
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
    if isinstance(value, dict):
        value = _of_several(value, key, f"{flag}: {path}")
    elif key is not None:
        raise ValueError(f"{flag}: {path} holds one array: leave out :{key}")
    tensor = torch.as_tensor(value)
    if tensor.is_complex() or tensor.dtype == torch.bool or not bool(tensor.isfinite().all()):
        raise ValueError(f"{flag}: {path} must hold finite numbers")
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


def _of_several(arrays: dict, key: str | None, where: str):
    if key is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        raise ValueError(f"{where} holds {', '.join(map(str, arrays))}: say which, as FILE:KEY")
    return arrays[key]
