"""The suite on another device: public functions get their models and tensors there, and hand their results back.

``bash scripts/test.sh --device cuda`` runs every test with the functions below as they are on a GPU, and every script
that a test runs in its own process with ``--device cuda``. What a test expects stays what it is. ``--device pretended``
does so on any machine (tests/elsewhere.py).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from unittest import mock

import scripts_in_process
import torch
from elsewhere import DEVICE as PRETENDED
from elsewhere import SecondDevice
from torch import Tensor, nn

from utils.graph.graph import Graph
from utils.network.symbolic import as_graph
from utils.runs import cli

# By module, what takes models or tensors and hands back tensors, or objects made of them.
FUNCTIONS = {
    "utils.certify.interface": ("certified_margin", "certified_radius"),
    "utils.certify.bab": ("decide",),
    "utils.certify.cascade.run": ("cascade",),
    "utils.certify.certificate": ("save_certificates",),
    "utils.certify.lipschitz": (
        "local_lipschitz",
        "sampled_lipschitz",
        "radius_without_stationary_point",
        "search_without_stationary_point",
    ),
    "utils.certify.outputs.bounds": ("output_bounds",),
    "utils.certify.outputs.band": ("band_radius",),
    "utils.certify.substitution.margins": ("substitution_margins",),
    "utils.certify.substitution.search": ("decide_substitution",),
    "utils.certify.substitution.certificates": ("save_substitution_certificates",),
    "utils.weights.problem": ("certified_weight_margin", "certified_weight_radius"),
    "utils.attack.pgd": ("pgd", "attack_radius"),
    "utils.attack.carlini_wagner": ("carlini_wagner",),
    "utils.attack.clever": ("clever",),
}


def run_on(device: torch.device) -> None:
    """Replace the functions, wherever they have been imported, for the rest of the process."""
    for module, names in FUNCTIONS.items():
        source = importlib.import_module(module)
        for name in names:
            _replace(getattr(source, name), device)
    if device == PRETENDED:
        scripts_in_process.run = _pretended(scripts_in_process.run)
    else:
        add = cli.add_common_arguments

        @functools.wraps(add)
        def added(parser, *args, **kwargs):
            add(parser, *args, **kwargs)
            parser.set_defaults(device=str(device))

        cli.add_common_arguments = added


def _pretended(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with SecondDevice(), mock.patch.object(cli, "resolve_device", return_value=PRETENDED):
            return function(*args, **kwargs)

    return call


def _replace(function, device: torch.device) -> None:
    there = _there(function, device)
    for name, module in list(sys.modules.items()):
        package = name.startswith("utils.") and hasattr(module, "__path__")
        if package or name == function.__module__:
            for own in [own for own, value in vars(module).items() if value is function]:
                setattr(module, own, there)


def _there(function, device: torch.device):
    """The function on the device, unless something of its arguments is there already or is without values."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = list(_tensors([args, kwargs]))
        if any(tensor.device.type != "cpu" for tensor in given):
            return function(*args, **kwargs)
        with SecondDevice() if device == PRETENDED else nullcontext():
            args, kwargs = moved((args, kwargs), device, {})
            return moved(function(*args, **kwargs), torch.device("cpu"), {})

    call.__signature__ = inspect.signature(function)
    return call


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, nn.Module):
        yield from value.parameters()


def moved(value, device: torch.device, known: dict):
    """The same with all its tensors on the device; a module is a copy there."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        found = value.to(device)
    elif isinstance(value, nn.Module):
        found = _copy(value, device)
    elif isinstance(value, Graph):
        first = next(filter(Tensor.is_floating_point, _tensors([vars(node) for node in value.nodes])), None)
        found = value if first is None else as_graph(value, first.dtype, device)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        found = type(value)(*(moved(part, device, known) for part in value))
    elif isinstance(value, (list, tuple)):
        found = type(value)(moved(part, device, known) for part in value)
    elif type(value) is dict:
        found = {key: moved(part, device, known) for key, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        found = copy.copy(value)
        for field in fields(value):
            object.__setattr__(found, field.name, moved(getattr(value, field.name), device, known))
    else:
        found = value
    known[id(value)] = found
    return found


def _copy(module: nn.Module, device: torch.device) -> nn.Module:
    if all(value.device == device for value in [*module.parameters(), *module.buffers()]):
        return module
    return copy.deepcopy(module).to(device)
