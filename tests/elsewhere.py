"""A pretended second device, so that the placement of tensors can be tested: its tensors have their values on the CPU.

Operations on tensors of both devices fail, as they would between a CPU and a GPU. ``bash scripts/test.sh --device
pretended`` runs what it can of the suite there (tests/on_device.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Backend:
    """What torch asks of a device's module. Not available: torch's own choices of a device leave it out."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
DEVICE = torch.device("pretended", 0)
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put_", "_index_put_impl_")
LENGTHS_ON_CPU = ("_pack_padded_sequence", "_pad_packed_sequence")


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; ``inner`` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if not all(issubclass(cls, kind) or kind is torch.nn.Parameter for kind in types):
            return NotImplemented  # a network is read
        if function in (torch.Tensor.tolist, torch.Tensor.__format__):
            return getattr(args[0].inner, function.__name__)(*args[1:])
        if function == torch.Tensor.data.__set__ and all(isinstance(arg, Elsewhere) for arg in args):
            args[0].inner = args[1].inner
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Tensors of lists are made here and moved, as is done for a GPU out of sight of operations."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(DEVICE)
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            args = (args[0], _without_lists(args[1]), *args[2:])
        return function(*args, **kwargs)


def _without_lists(index):
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _as_subclass(tensor, kind):
    """What stands for a tensor while a network is read has no values."""
    if not isinstance(tensor, Elsewhere):
        return torch._C.TensorBase.as_subclass(tensor, kind)
    layout = {"strides": tensor.stride(), "dtype": tensor.dtype, "device": DEVICE}
    kind = type(kind.__name__, (kind,), {"__torch_dispatch__": _no_operation})
    return torch.Tensor._make_wrapper_subclass(kind, tensor.shape, **layout)


@classmethod
def _no_operation(cls, function, types, args=(), kwargs=None):
    raise AssertionError(f"{function} of a tensor without values")


class SecondDevice(ExitStack):
    """Within it, tensors that are made on the device or moved there have values."""

    def __enter__(self):
        self.enter_context(mock.patch.object(torch.Tensor, "as_subclass", _as_subclass))
        self.enter_context(_Lists())
        self.enter_context(_Operations())
        return super().__enter__()


def check_devices(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the operation happens elsewhere; fails if its tensors are on two devices (single numbers may be)."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [isinstance(value, Elsewhere) for value in tensors if value.dim() or isinstance(value, Elsewhere)]
    if name in INDEXING:  # numbers of rows may be on the CPU, wherever the rows are
        assert isinstance(args[0], Elsewhere) or not any(there), f"{name} by numbers that are on another device"
        values = [value for value in args[2:3] if isinstance(value, torch.Tensor) and value.dim()]
        assert all(isinstance(value, Elsewhere) == isinstance(args[0], Elsewhere) for value in values), name
    elif name not in (*COPIES, *LENGTHS_ON_CPU):
        assert all(there) or not any(there), f"{name} of tensors on two devices"
    return any(there)


def dispatch(function, args: tuple, kwargs: dict):
    name = function.overloadpacket.__name__
    elsewhere = check_devices(name, args, kwargs)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
        elsewhere = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    found = _FUSED.get(name, function)(*args_here, **kwargs_here)
    if name.endswith("_") and not name.startswith("__"):
        if torch.Tag.inplace_view in function.tags and isinstance(args[0], Elsewhere):
            with no_dispatch():  # shape and strides of the outer tensor
                function(*args, **kwargs)
        return args[0]
    if name == "_pack_padded_sequence" and elsewhere:
        return Elsewhere(found[0]), found[1]
    if not elsewhere:
        return found
    return tree_map(lambda v: Elsewhere(v) if type(v) is torch.Tensor else v, found)


def lstm_cell(from_input, from_state, c, b_ih=None, b_hh=None):
    """The kernel that stands for a step of an LSTM on devices: (h, c, what its gradient needs)."""
    gates = from_input + from_state if b_ih is None else from_input + from_state + b_ih + b_hh
    i, f, g, o = gates.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], dim=1)


def lstm_cell_gradient(grad_h, grad_c, c, new, gates, has_bias):
    i, f, g, o = gates.chunk(4, dim=1)
    grad_h = torch.zeros_like(new) if grad_h is None else grad_h
    grad_c = torch.zeros_like(new) if grad_c is None else grad_c
    through = grad_c + grad_h * o * (1 - new.tanh() ** 2)
    of_gates = (through * g * i * (1 - i), through * c * f * (1 - f), through * i * (1 - g**2))
    of_gates = torch.cat([*of_gates, grad_h * new.tanh() * o * (1 - o)], dim=1)
    return of_gates, through * f, of_gates.sum(dim=0) if has_bias else None


def gru_cell(from_input, from_state, h, b_ih=None, b_hh=None):
    """Likewise of a GRU: (h, what its gradient needs)."""
    if b_ih is not None:
        from_input, from_state = from_input + b_ih, from_state + b_hh
    (ri, zi, ni), (rh, zh, nh) = from_input.chunk(3, dim=1), from_state.chunk(3, dim=1)
    r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
    n = (ni + r * nh).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, nh], dim=1)


def gru_cell_gradient(grad, kept, has_bias):
    r, z, n, h, nh = kept.chunk(5, dim=1)
    of_n = grad * (1 - z) * (1 - n**2)
    of_r, of_z = of_n * nh * r * (1 - r), grad * (h - n) * z * (1 - z)
    of_input, of_state = torch.cat([of_r, of_z, of_n], dim=1), torch.cat([of_r, of_z, of_n * r], dim=1)
    biases = (of_input.sum(dim=0), of_state.sum(dim=0)) if has_bias else (None, None)
    return of_input, of_state, grad * z, *biases


_FUSED = {
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": lstm_cell_gradient,
    "_thnn_fused_gru_cell": gru_cell,
    "_thnn_fused_gru_cell_backward": gru_cell_gradient,
}
