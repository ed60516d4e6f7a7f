"""A pretended second device: tensors that say they are on "meta" but have values, so that placement can be tested.

Operations on tensors of both devices fail, as they would between a CPU and a GPU.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
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
        if function is torch.Tensor.tolist:
            return args[0].inner.tolist()
        if function == torch.Tensor.data.__set__ and all(isinstance(arg, Elsewhere) for arg in args):
            args[0].inner = args[1].inner
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within it, tensors that are made on "meta" or moved there are on the pretended device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def check_devices(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the operation happens elsewhere; fails if its tensors are on two devices (single numbers may be)."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    lost = [value for value in tensors if value.is_meta and not isinstance(value, Elsewhere)]
    assert not lost, f"{name} of a tensor without values: a list as an index cannot be pretended"
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
    if kwargs.get("device") is not None:
        elsewhere = torch.device(kwargs["device"]) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    found = function(*args_here, **kwargs_here)
    if name.endswith("_") and not name.startswith("__"):
        return args[0]
    if name == "_pack_padded_sequence" and elsewhere:
        return Elsewhere(found[0]), found[1]
    if not elsewhere:
        return found
    return tree_map(lambda v: Elsewhere(v) if type(v) is torch.Tensor else v, found)
