"""Reads any module's forward into a graph: its own Python code runs once, on symbolic tensors.

``Traced`` is a tensor that has shape, dtype and device but no values. Every torch function that meets one comes to
``Traced.__torch_function__``, where ``OPERATIONS`` says what it does to symbols (``symbolic``). Loops over time
steps, hand-written cells and everything else that depends on shapes alone just run. What has no bound, or depends on
the values of the input, is refused with the line of the forward that does it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import linecache
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.graph import Graph
from . import images
from .constants.extra import NOTHING, Extra
from .kept import kept
from .modules import usable_model
from .outputs import ENDS, SCORES, VALUES, Outputs
from .state import plain_state, user_defaults
from .symbolic import Builder, Symbol, UnsupportedError, as_graph, check_scores, constant, join

BATCH = 2  # samples that are traced together, to see that they are not mixed
SEVERAL = (
    "the samples have masks, lengths or further arguments of their own, so each kind of them has a graph of its own: "
    "give samples that are alike in these at a time"
)
UNREAD = ": word numbers are perturbed where they are looked up in an nn.Embedding as they are"
# Largest difference, relative to the largest output, between a graph and its module, by the module's precision.
SAME = {torch.float32: 1e-3, torch.float64: 1e-9}
HIDDEN_FILES = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)
HIDDEN_FILES += tuple(
    str(Path(__file__).with_name(name)) for name in ("symbolic.py", "state.py", "operations", "constants")
)

Handler = Callable[..., object]
OPERATIONS: dict[str, Handler] = {}
# What makes a node of a softmax that something reads; ``operations.attention`` sets it.
SETTLE: list[Callable] = [lambda builder, value: value]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


METADATA = _names(
    "size dim ndimension numel nelement element_size is_same_size is_floating_point is_complex is_contiguous "
    "get_device __len__ __repr__ __hash__ __class__"
)
PROPERTIES = _names(
    "shape dtype device ndim layout requires_grad names grad_fn is_leaf itemsize is_cuda is_sparse is_nested is_mps "
    "is_xpu is_quantized is_meta is_mkldnn"
)
VIEWS = _names(
    "reshape flatten unflatten ravel permute transpose swapaxes swapdims t movedim moveaxis squeeze unsqueeze expand "
    "broadcast_to repeat repeat_interleave tile flip fliplr flipud roll narrow select index_select __getitem__ gather "
    "take_along_dim split split_with_sizes tensor_split chunk unbind diagonal contiguous clone"
)
# Besides the views, operations whose result shares its memory with their operand.
ALIASES = _names(
    "view view_as reshape_as expand_as T mT __iter__ to float double type_as type cpu cuda detach data requires_grad "
    "positive __pos__ dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout"
)
FILLED = _names("zeros_like ones_like full_like new_zeros new_ones new_full")
ATTENTION = "attention multiplies perturbed values with each other and takes an exponential of them: no bound here"
BATCH_SECOND = (
    ". x is (batch, T, n), but the layer is built with batch_first=False and takes the first axis for time: build it "
    "with batch_first=True, or let the forward transpose"
)
ROUNDING = "it rounds perturbed values to whole numbers, and has jumps: no bound here"
ITEM = "the forward must not depend on the input's values, but one is asked for"
ORDER = "an order of values depends on the input: no bound here"
COMPARISON = (
    "a mask or choice that is made by comparing the input's values depends on them: make it from shapes, or before, "
    "and keep it as a constant of the module (for frames of padding give lengths to a SequenceClassifier); if it is "
    "max(x, c) or min(x, c), write clamp or relu"
)
REASONS = {
    "_transformer_encoder_layer_fwd": ATTENTION,
    "_native_multi_head_attention": ATTENTION,
    "rdiv": "a division by values of the input has no bound here: divide by constants",
    "reciprocal": "a division by values of the input has no bound here: divide by constants",
    "norm": "the length of perturbed values has no bound here: divide by a constant instead",
    "floordiv": ROUNDING,
    "floor_divide": ROUNDING,
    "remainder": ROUNDING,
    "mod": ROUNDING,
    "floor": ROUNDING,
    "ceil": ROUNDING,
    "round": ROUNDING,
    "pow": "a power of perturbed values has no bound here: only linear functions of them and their activations have",
    "rpow": "an exponential of perturbed values has no bound here",
    "exp": "an exponential of perturbed values has no bound here",
    "numpy": "the values leave torch for NumPy, where nothing is read: compute with torch",
    "nan_to_num": "it depends on the input's values: leave it out, inputs are finite",
    "__bool__": "the forward must not depend on the input's values, but its truth value is asked for",
    **dict.fromkeys(("item", "float", "int", "index", "tolist"), ITEM),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "greater_equal", "less_equal"), COMPARISON),
    **dict.fromkeys(("any", "all", "isnan", "isfinite", "isinf", "sign", "nonzero", "equal", "allclose"), COMPARISON),
    **dict.fromkeys(("sort", "argsort", "topk", "argmax", "argmin", "kthvalue", "median"), ORDER),
}
MAX_POOLS = ("max_pool3d", "adaptive_max_pool3d", "max", "amax")


class Traced(torch.Tensor):
    """A tensor without values, and the symbol that it stands for.

    Tensors that share memory share ``storage_version``, a count of changes in place. One that has not seen the last
    change is not used any more.
    """

    symbol: Symbol
    builder: Builder
    storage_version: list[int]
    seen_version: int

    @staticmethod
    def of(builder: Builder, symbol: Symbol, like: Tensor, storage: list[int] | None = None) -> Traced:
        shell = torch.zeros((), dtype=like.dtype, device=like.device).expand(symbol.shape).as_subclass(Traced)
        shell.builder, shell.symbol = builder, symbol
        shell.storage_version = [0] if storage is None else storage
        shell.seen_version = shell.storage_version[0]
        return shell

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name == "__get__":
            name = property_name(function)
            if name in PROPERTIES:
                return _plainly(function, args, kwargs)
        if name in METADATA:
            return _plainly(function, args, kwargs)
        try:
            check_autocast(args, kwargs)
            with plain_state():
                return _apply(name, function, args, kwargs)
        except UnsupportedError as error:
            if getattr(error, "located", False):
                raise
            raise located(f"{_spoken(name)}: {error}") from None
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise located(f"{_spoken(name)}: {' '.join(str(error).split())}") from error


def property_name(getter) -> str:
    """Of the ``__get__`` of a tensor's property; torch's own way to the name takes a tenth of a second at first."""
    owner = getter.__self__
    return getattr(owner, "__name__", None) or owner.fget.__name__


def check_autocast(*given) -> None:
    """Refuse a forward's own autocast; a caller's has no effect, as that is ``plain_state``."""
    device = next(value.device.type for value in _flat(given) if isinstance(value, Traced))
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        raise UnsupportedError(
            f"the forward computes under autocast, which rounds to {dtype}: leave it out, or switch it off "
            "in evaluation"
        )


def _plainly(function, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


SIGNS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "div": "/", "floordiv": "//", "mod": "%", "pow": "**"}
SIGNS |= {"matmul": "@", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "remainder": "%"}
SIGNS |= {"setitem": "[...] = ...", "getitem": "[...]", "bool": "if", "multi_head_attention_forward": "attention"}


def _spoken(name: str) -> str:
    """An operation's name in a user's words: of operators their signs."""
    bare = name.strip("_")
    sign = SIGNS.get(bare.removeprefix("r")) or SIGNS.get(bare.removeprefix("i")) if name.startswith("__") else None
    return sign or SIGNS.get(bare, bare)


def located(message: str) -> UnsupportedError:
    """An error that says where in the user's code it happened."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(HIDDEN_FILES):
        frame = None if frame.f_code is TracedModule._trace.__code__ else frame.f_back  # no line of the user's
    if frame is not None:
        file, number = frame.f_code.co_filename, frame.f_lineno
        line = linecache.getline(file, number).strip()
        message += f" ({Path(file).name}, line {number}{': ' + line if line else ''})"
    error = UnsupportedError(message)
    error.located = True
    return error


def _apply(name: str, function, args, kwargs):
    """Run an operation on symbols and wrap what it gives."""
    some = next(value for value in _flat((args, kwargs)) if isinstance(value, Traced))
    for value in _flat((args, kwargs)):
        if isinstance(value, Traced) and value.seen_version != value.storage_version[0]:
            raise UnsupportedError("a tensor that it reads was changed in place through another view of it")
    if name == "__setitem__":
        return _assign(some.builder, *args)
    name, in_place = _in_place(name, kwargs)
    symbols, options = _unwrap(args), _unwrap(kwargs)
    storage = some.storage_version if name in VIEWS | ALIASES and name != "clone" else None
    if name in FILLED:
        return _filled(name, some, args, kwargs)
    if name in VIEWS or name in OPERATIONS:
        result = _computed(some.builder, name, function, symbols, options)
    elif name in REASONS or name.strip("_") in REASONS:
        raise UnsupportedError(REASONS.get(name) or REASONS[name.strip("_")])
    elif name.strip("_").removesuffix("_with_indices") in MAX_POOLS:
        raise UnsupportedError("a maximum has no bound here, but those of max_pool1d and max_pool2d")
    else:
        raise UnsupportedError("this operation is not supported")
    if in_place:
        target = args[0]
        if not isinstance(target, Traced) or result.shape != target.shape:
            raise UnsupportedError("values are written in place into another tensor: write it without")
        target.symbol = result
        target.storage_version[0] += 1
        target.seen_version = target.storage_version[0]
        return target
    wrapped = _wrap(result, some, storage)
    return iter(wrapped) if name == "__iter__" else wrapped


def _computed(builder: Builder, name: str, function, symbols, options):
    """What an operation makes of symbols: a softmax that it reads is made a node, one that it only moves is not yet."""

    def run(settle: bool):
        arguments, how = (SETTLE[0](builder, value) if settle else value for value in (symbols, options))
        if name in VIEWS:
            return _view(function, arguments, how)
        return OPERATIONS[name](builder, *arguments, **how)

    moves = name in VIEWS | ALIASES
    result = run(settle=not moves)
    waits = any(isinstance(value, Symbol) and value.softmax for value in _flat((symbols, options)))
    if not moves or not waits:
        return result
    if isinstance(result, Symbol):
        return replace(result, settle=lambda: run(settle=True))
    parts = [replace(part, settle=lambda k=k: run(settle=True)[k]) for k, part in enumerate(result)]
    return type(result)(parts)


def _in_place(name: str, kwargs: dict) -> tuple[str, bool]:
    """The operation's name without the mark of the in-place variant, and whether it is one."""
    if kwargs.pop("inplace", False):
        return name.removesuffix("_"), True
    if name.startswith("__i") and name.endswith("__") and f"__{name[3:]}" in OPERATIONS:
        return f"__{name[3:]}", True
    if name.endswith("_") and not name.endswith("__") and name[:-1] in OPERATIONS:
        return name[:-1], True
    return name, False


def _assign(builder: Builder, target: Tensor, index, value) -> None:
    """``target[index] = value``, which makes an ordinary tensor a traced one until the forward is over."""
    if any(isinstance(part, Traced) for part in _flat(index)):
        raise UnsupportedError("an index must not depend on the input")
    if not target.is_floating_point():
        raise UnsupportedError(f"numbers are rounded to {target.dtype}")
    symbol, value, index = as_symbol(_unwrap(target)), as_symbol(_unwrap(value)), plain_words(index)
    check_written(symbol, value)
    parts = []
    for own, new in zip((symbol.ids, symbol.scale, symbol.shift), (value.ids, value.scale, value.shift), strict=True):
        part = own.clone()
        part[index] = new
        parts.append(part)
    if not isinstance(target, Traced):
        builder.borrow(target, Traced)
        target.builder, target.storage_version = builder, [0]
    target.symbol = Symbol(*parts)
    target.storage_version[0] += 1
    target.seen_version = target.storage_version[0]


def check_written(*symbols: Symbol) -> None:
    for symbol in symbols:
        check_scores(symbol)


def _flat(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _unwrap(value):
    if isinstance(value, Traced):
        return value.symbol
    if isinstance(value, dict):
        return {key: _unwrap(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_unwrap(part) for part in value)
    if isinstance(value, Tokens):
        value.reading.constants.append(plain_words(value))
    # Symbols are on the CPU, wherever the module is.
    return plain_words(value).cpu() if isinstance(value, Tensor) else value


def _wrap(result, like: Traced, storage):
    if isinstance(result, Symbol):
        return Traced.of(like.builder, result, like, storage)
    if isinstance(result, (tuple, list)):
        parts = [_wrap(part, like, storage) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _filled(name: str, like: Traced, args, kwargs) -> Tensor:
    """Constants with the shape, type or device of a traced tensor: an ordinary tensor."""
    first, *rest = args
    real = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if first is not like:
        raise UnsupportedError("constants must not depend on the input's values")
    return getattr(torch if name.endswith("like") else torch.Tensor, name)(real, *rest, **kwargs)


def _view(function, args, kwargs):
    symbol, *rest = args
    if not isinstance(symbol, Symbol) or any(isinstance(value, Symbol) for value in _flat((rest, kwargs))):
        raise UnsupportedError("an index or shape must not depend on the input")
    outputs = [function(part, *rest, **kwargs) for part in (symbol.ids, symbol.scale, symbol.shift)]
    if isinstance(outputs[0], Tensor):
        return Symbol(*outputs, symbol.softmax)
    return tuple(Symbol(*parts, symbol.softmax) for parts in zip(*outputs, strict=True))


# --- operations -------------------------------------------------------------------------------------------------------


def operation(*names: str):
    """Register a handler: called with the builder and the call's arguments, symbols in place of traced tensors."""

    def register(handler: Handler) -> Handler:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return register


def as_symbol(value) -> Symbol:
    return value if isinstance(value, Symbol) else constant(value)


def _shaped(change: Callable[[Tensor, Sequence[int]], Tensor]) -> Handler:
    def handler(builder, x, *shape, **kwargs):
        shape = kwargs.get("size", kwargs.get("other", shape[0] if len(shape) == 1 else shape))
        if isinstance(shape, torch.dtype):
            raise UnsupportedError("bits are read as another type")
        target = shape.shape if isinstance(shape, (Symbol, Tensor)) else shape
        target = (target,) if isinstance(target, int) else tuple(target)
        return x.view(lambda part: change(part, target)) if isinstance(x, Symbol) else change(x, target)

    return handler


for _name in ("view", "view_as", "reshape_as"):
    OPERATIONS[_name] = _shaped(lambda part, shape: part.reshape(shape))
OPERATIONS["expand_as"] = _shaped(lambda part, shape: part.expand(shape))


@operation("T")
def _transposed(builder, x):
    if len(x.shape) != 2:
        raise UnsupportedError("T is read of matrices only")
    return x.view(lambda part: part.T)


OPERATIONS["mT"] = lambda builder, x: x.view(lambda part: part.mT)


@operation("__iter__")
def _iterate(builder, x):
    return [x.view(lambda part, k=k: part[k]) for k in range(x.shape[0])]


@operation("to", "float", "double", "type_as", "type", "cpu", "cuda", "detach", "requires_grad", "data")
def _same_values(builder, x, *args, **kwargs):
    for value in _flat((args, kwargs)):
        if isinstance(value, torch.dtype) and value not in SAME:
            raise UnsupportedError(f"numbers are rounded to {value}")
    return x


@operation("cat", "concat", "concatenate")
def _cat(builder, tensors, dim=0, axis=None):
    return join(lambda parts: torch.cat(parts, dim=dim if axis is None else axis), [as_symbol(x) for x in tensors])


@operation("stack")
def _stack(builder, tensors, dim=0):
    return join(lambda parts: torch.stack(parts, dim=dim), [as_symbol(x) for x in tensors])


@operation("hstack")
def _hstack(builder, tensors):
    return join(torch.hstack, [as_symbol(x) for x in tensors])


@operation("vstack")
def _vstack(builder, tensors):
    return join(torch.vstack, [as_symbol(x) for x in tensors])


@operation("pad")
def _pad(builder, x, pad, mode="constant", value=None):
    if mode != "constant":
        raise UnsupportedError(f"padding by {mode!r} is not supported")
    if value is not None and not math.isfinite(value):
        raise UnsupportedError("padding by what is not finite has no bound here: a maximum has a padding of its own")
    fills = (-1, 0.0, value or 0.0)
    return Symbol(*(F.pad(p, pad, value=fill) for p, fill in zip((x.ids, x.scale, x.shift), fills, strict=True)))


@operation("where")
def _where(builder, condition, x, y):
    if isinstance(condition, Symbol):
        raise UnsupportedError("what is chosen must not depend on the input's values")
    return join(lambda parts: torch.where(condition, *parts), [as_symbol(x), as_symbol(y)])


@operation("masked_fill")
def _masked_fill(builder, x, mask, value):
    return _where(builder, mask, value, x)


@operation("add", "__add__", "__radd__")
def _add(builder, x, y, alpha=1):
    y = as_symbol(y)
    return builder.add(as_symbol(x), y if alpha == 1 else builder.scaled(y, constant(alpha)))


@operation("sub", "subtract", "__sub__")
def _sub(builder, x, y, alpha=1):
    return builder.add(as_symbol(x), builder.scaled(as_symbol(y), constant(-alpha)))


@operation("rsub", "__rsub__")
def _rsub(builder, x, y, alpha=1):
    return _sub(builder, y, x, alpha)


@operation("neg", "negative", "__neg__")
def _negative(builder, x):
    return builder.scaled(x, constant(-1.0))


@operation("positive", "__pos__")
def _positive(builder, x):
    return x


@operation("mul", "multiply", "__mul__", "__rmul__")
def _multiply(builder, x, y):
    return builder.multiply(as_symbol(x), as_symbol(y))


@operation("div", "divide", "true_divide", "__truediv__")
def _divide(builder, x, y, rounding_mode=None):
    if isinstance(y, Symbol) or rounding_mode is not None:
        raise UnsupportedError("only a division by constants is supported, not by values that depend on the input")
    return builder.scaled(x, constant(1.0 / torch.as_tensor(y, dtype=torch.float64)))


@operation("sum")
def _sum(builder, x, dim=None, keepdim=False, axis=None, dtype=None):
    return builder.sum(x, _axes(dim if axis is None else axis), keepdim)


@operation("mean")
def _mean(builder, x, dim=None, keepdim=False, axis=None, dtype=None):
    return builder.mean(x, _axes(dim if axis is None else axis), keepdim)


def _axes(dim) -> tuple[int, ...]:
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


# --- activations ---


def _activation(name: str) -> Handler:
    return lambda builder, x: builder.activation(x, name)


for _name in ("relu", "tanh", "sigmoid"):
    OPERATIONS[_name] = _activation(_name)
OPERATIONS["expit"] = _activation("sigmoid")
OPERATIONS["relu6"] = _activation("hardtanh(0,6)")


OPERATIONS["arctan"] = OPERATIONS["atan"] = _activation("arctan")


@operation("softplus")
def _softplus(builder, x, beta=1.0, threshold=20.0):
    if threshold < 20.0:
        raise UnsupportedError("softplus is supported with a threshold of 20 or more")
    y = builder.activation(x if beta == 1.0 else builder.scaled(x, constant(beta)), "softplus")
    return y if beta == 1.0 else builder.scaled(y, constant(1 / beta))


@operation("leaky_relu")
def _leaky_relu(builder, x, negative_slope=0.01):
    return builder.activation(x, f"leaky_relu({negative_slope!r})")


def _hardtanh(builder, x, min_val=-1.0, max_val=1.0):
    return builder.activation(x, f"hardtanh({float(min_val)!r},{float(max_val)!r})")


def _clip(builder, x, min=None, max=None):
    if isinstance(min, (Tensor, Symbol)) or isinstance(max, (Tensor, Symbol)):
        raise UnsupportedError("only numbers are supported as ends")
    return _hardtanh(builder, x, -math.inf if min is None else min, math.inf if max is None else max)


OPERATIONS.update({"hardtanh": _hardtanh, "clamp": _clip, "clip": _clip})
OPERATIONS["clamp_min"] = lambda builder, x, min: _clip(builder, x, min, None)
OPERATIONS["clamp_max"] = lambda builder, x, max: _clip(builder, x, None, max)


@operation("hardsigmoid")
def _hardsigmoid(builder, x):
    shifted = builder.add(builder.scaled(x, constant(1 / 6)), constant(0.5))
    return builder.activation(shifted, "hardtanh(0,1)")


@operation("softmax", "log_softmax")
def _softmax(builder, x, dim=None, _stacklevel=3, dtype=None, name="softmax"):
    check_scores(x)
    last = len(x.shape) - 1
    if last < 1 or (dim not in (last, -1) and not (dim is None and last == 1)):
        raise UnsupportedError("a softmax is supported at the end of the network only, over the classes, the last axis")
    return Symbol(x.ids, x.scale, x.shift, name)


OPERATIONS["log_softmax"] = functools.partial(_softmax, name="log_softmax")


@operation(
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"
)
def _dropout(builder, x, p=0.5, training=True, train=None):
    if (training if train is None else train) and p > 0:
        raise UnsupportedError("dropout is random in training mode: call model.eval() first")
    return x


# --- linear layers ---


@operation("linear")
def _linear(builder, x, weight, bias=None):
    _need_constants(weight, bias)
    return builder.linear(x, weight, bias)


def _need_constants(*values) -> None:
    if any(isinstance(value, Symbol) for value in _flat(values)):
        raise UnsupportedError("a product of two tensors that both depend on the input has no bound here")


@operation("matmul", "__matmul__", "mm", "mv", "bmm", "dot")
def _matmul(builder, x, y):
    if isinstance(x, Symbol) and isinstance(y, Symbol):
        _need_constants(y)
    if isinstance(y, Symbol):  # (W y) = (y' W')'
        if x.dim() != 2 or len(y.shape) < 2:
            raise UnsupportedError("only a matrix is supported as the constant factor")
        return builder.linear(y.view(lambda part: part.mT), x).view(lambda part: part.mT)
    if y.dim() == 1:
        return builder.linear(x, y[None]).view(lambda part: part.squeeze(-1))
    if y.dim() != 2:
        raise UnsupportedError("only a matrix is supported as the constant factor")
    return builder.linear(x, y.T)


@operation("__rmatmul__")
def _rmatmul(builder, x, y):
    return _matmul(builder, y, x)


@operation("addmm", "addmv")
def _addmm(builder, x, a, b, beta=1, alpha=1):
    product = builder.scaled(_matmul(builder, a, b), constant(alpha))
    return builder.add(builder.scaled(as_symbol(x), constant(beta)), product)


def _numbers(value, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank // len(value))


def _pads(padding: Sequence[int]) -> list[int]:
    return [width for size in reversed(padding) for width in (size, size)]


def _convolution(rank: int) -> Handler:
    def handler(builder, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        _need_constants(weight, bias)
        stride, dilation = _numbers(stride, rank), _numbers(dilation, rank)
        if isinstance(padding, str):
            reaches = [(size - 1) * step for size, step in zip(weight.shape[2:], dilation, strict=True)]
            around = [(reach // 2, reach - reach // 2) if padding == "same" else (0, 0) for reach in reaches]
            pads = [width for pair in reversed(around) for width in pair]
        else:
            pads = _pads(_numbers(padding, rank))
        return images.convolve(builder, x, weight, bias, stride, pads, dilation, groups)

    return handler


def _transposed_convolution(rank: int) -> Handler:
    def handler(builder, x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        _need_constants(weight, bias)
        numbers = [_numbers(value, rank) for value in (stride, padding, output_padding, dilation)]
        return images.convolve_transposed(builder, x, weight, bias, *numbers, groups)

    return handler


def _dense_convolution(function) -> Handler:
    def handler(builder, x, weight, bias=None, *args, **kwargs):
        _need_constants(weight, bias)
        weight = weight.to("cpu", torch.float64)
        if bias is not None:
            bias = bias.reshape(-1, *[1] * (len(x.shape) - 2))
        return builder.linear_map(x, lambda part: function(part, weight, None, *args, **kwargs), bias)

    return handler


OPERATIONS |= {"conv1d": _convolution(1), "conv2d": _convolution(2)}
OPERATIONS |= {"conv_transpose1d": _transposed_convolution(1), "conv_transpose2d": _transposed_convolution(2)}
for _name in ("conv3d", "conv_transpose3d"):
    OPERATIONS[_name] = _dense_convolution(getattr(F, _name))


def _pooling(function) -> Handler:
    return lambda builder, x, *args, **kwargs: builder.linear_map(x, lambda part: function(part, *args, **kwargs))


OPERATIONS["avg_pool3d"] = _pooling(F.avg_pool3d)


def _average_pool(rank: int) -> Handler:
    def handler(
        builder, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        check_scores(x)
        kernel = _numbers(kernel_size, rank)
        stride = _numbers(stride, rank) if stride else kernel
        pads = _pads(_numbers(padding, rank))
        return images.average_pool(builder, x, kernel, stride, pads, ceil_mode, count_include_pad, divisor_override)

    return handler


def _even_windows(x: Symbol, output_size, rank: int) -> tuple[int, ...] | None:
    """Sides of the windows of adaptive pooling, where they are all alike."""
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * rank
    sizes = [own if size is None else size for size, own in zip(sizes, x.shape[2:], strict=True)]
    if any(own % size for own, size in zip(x.shape[2:], sizes, strict=True)):
        return None
    return tuple(own // size for own, size in zip(x.shape[2:], sizes, strict=True))


def _adaptive_average_pool(rank: int) -> Handler:
    function = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)[rank - 1]

    def handler(builder, x, output_size):
        check_scores(x)
        kernel = _even_windows(x, output_size, rank)
        if kernel is None:
            return builder.linear_map(x, lambda part: function(part, output_size))
        return images.average_pool(builder, x, kernel, kernel, [0] * (2 * rank))

    return handler


def _max_pool(rank: int) -> Handler:
    function = (F.max_pool1d, F.max_pool2d)[rank - 1]

    def handler(builder, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices:
            raise UnsupportedError(ORDER)
        kernel, padding, dilation = (_numbers(value, rank) for value in (kernel_size, padding, dilation))
        stride = _numbers(stride, rank) if stride else kernel
        shape = function(torch.zeros(1, 1, *x.shape[2:]), kernel, stride, padding, dilation, ceil_mode).shape
        return images.max_pool(builder, x, kernel, stride, _pads(padding), dilation, shape[2:])

    return handler


def _adaptive_max_pool(rank: int) -> Handler:
    def handler(builder, x, output_size, return_indices=False):
        kernel = _even_windows(x, output_size, rank)
        if kernel is None or return_indices:
            raise UnsupportedError("an adaptive maximum is supported where all its windows are of one size")
        places = [own // size for own, size in zip(x.shape[2:], kernel, strict=True)]
        return images.max_pool(builder, x, kernel, kernel, [0] * (2 * rank), [1] * rank, places)

    return handler


for _rank in (1, 2):
    OPERATIONS[f"avg_pool{_rank}d"] = _average_pool(_rank)
    OPERATIONS[f"adaptive_avg_pool{_rank}d"] = _adaptive_average_pool(_rank)
    OPERATIONS[f"max_pool{_rank}d"] = OPERATIONS[f"max_pool{_rank}d_with_indices"] = _max_pool(_rank)
    OPERATIONS[f"adaptive_max_pool{_rank}d"] = _adaptive_max_pool(_rank)
    OPERATIONS[f"adaptive_max_pool{_rank}d_with_indices"] = _adaptive_max_pool(_rank)


@operation("batch_norm")
def _batch_norm(builder, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or mean is None:
        raise UnsupportedError("it mixes the samples of a batch in training mode: call model.eval() first")
    shape = (-1, *[1] * (len(x.shape) - 2))
    factor = 1.0 / (var.to("cpu", torch.float64) + eps).sqrt()
    factor = factor if weight is None else factor * weight.to("cpu", torch.float64)
    shift = -mean.to("cpu", torch.float64) * factor
    shift = shift if bias is None else shift + bias.to("cpu", torch.float64)
    return builder.add(builder.scaled(x, constant(factor.reshape(shape))), constant(shift.reshape(shape)))


# --- recurrent layers ---


def _recurrent(kind: str, nonlinearity: str = "tanh") -> Handler:
    def handler(builder, x, state, weights, biases, layers, dropout, train, bidirectional, batch_first=False):
        if not isinstance(biases, bool):
            raise UnsupportedError("packed sequences are read where all samples are alike")
        if train and dropout > 0 and layers > 1:
            raise UnsupportedError("dropout is random in training mode: call model.eval() first")
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        plain = 4 if biases else 2
        if batch_first:
            x = as_symbol(x).view(lambda part: part.transpose(0, 1))
        state = [as_symbol(part) for part in (state if kind == "lstm" else (state,))]
        frames = _iterate(builder, as_symbol(x))
        finals = []
        for layer in range(layers):
            runs = []
            for direction in range(directions):
                row = layer * directions + direction
                own = weights[row * each : (row + 1) * each]
                own = [*own[:plain], *(None,) * (4 - plain), *own[plain:]]  # an LSTM's projection comes last
                start = tuple(part.view(lambda p, row=row: p[row]) for part in state)
                try:
                    hidden, final = builder.recurrent(kind, frames, start, own, nonlinearity, backwards=bool(direction))
                except UnsupportedError as error:
                    raise UnsupportedError(f"{error}{'' if batch_first else BATCH_SECOND}") from None
                runs.append(hidden)
                finals.append(final)
            frames = [join(lambda parts: torch.cat(parts, dim=-1), pair) for pair in zip(*runs, strict=True)]
        output = join(lambda parts: torch.stack(parts, dim=1 if batch_first else 0), frames)
        return output, *(join(torch.stack, parts) for parts in zip(*finals, strict=True))

    return handler


def _cell(kind: str, nonlinearity: str = "tanh") -> Handler:
    def handler(builder, x, state, w_ih, w_hh, b_ih=None, b_hh=None):
        state = tuple(as_symbol(part) for part in (state if kind == "lstm" else (state,)))
        weights = (w_ih, w_hh, b_ih, b_hh)
        _, final = builder.recurrent(kind, [as_symbol(x)], state, weights, nonlinearity)
        return final if kind == "lstm" else final[0]

    return handler


OPERATIONS.update({"lstm": _recurrent("lstm"), "gru": _recurrent("gru"), "lstm_cell": _cell("lstm")})
OPERATIONS["gru_cell"] = _cell("gru")
for _name in ("tanh", "relu"):
    OPERATIONS[f"rnn_{_name}"], OPERATIONS[f"rnn_{_name}_cell"] = _recurrent("rnn", _name), _cell("rnn", _name)


@operation("embedding")
def _embedding(builder, x, weight, padding_idx=None, max_norm=None, *args, **kwargs):
    raise UnsupportedError("it needs whole numbers: give the word numbers themselves as the input")


# --- modules ----------------------------------------------------------------------------------------------------------


class Reading:
    """One run of a forward on word numbers: the table that they are looked up in, and what else is made of them.

    Attributes:
        builder: of the graph; None if the run only finds out what is constant.
        table: of the vectors that are perturbed, once they were looked up, and ``vectors``, (batch, T, n).
        constants: all that was computed from word numbers, in the order of the calls.
    """

    def __init__(self, builder: Builder | None, shape: Sequence[int]):
        self.builder, self.shape = builder, shape
        self.table: Tensor | None = None
        self.vectors: Symbol | None = None
        self.constants: list[object] = []
        self._of_computed: list[Tensor] = []

    def look_up(self, weight: Tensor, max_norm: float | None = None) -> Symbol:
        """The vectors of all words, (batch, T, n). Raises UnsupportedError for a second table."""
        if max_norm is not None:
            raise UnsupportedError("max_norm changes the vectors as they are read")
        if self.table is None:
            self.table = weight
            self.vectors = self.builder.input(self.shape[0], (self.shape[1], weight.shape[1]))
        elif self.table is not weight:
            raise UnsupportedError("the word numbers go into two embeddings; one can be perturbed")
        self._check_table()
        return self.vectors

    def look_up_computed(self, weight: Tensor) -> None:
        """Note a table in which numbers are looked up that were computed: its vectors are constants."""
        self._of_computed.append(weight)
        self._check_table()

    def _check_table(self) -> None:
        if any(weight is self.table for weight in self._of_computed):
            raise UnsupportedError(
                "word numbers are looked up as they are and after a change in the same table: let the forward do "
                "without, or change them before"
            )


class Tokens(torch.Tensor):
    """Word numbers as a module's input: what is looked up for them is perturbed, what is computed from them constant.

    ``places`` says for every element which word of the batch it is, through whatever moves or drops words. It is None
    of whole numbers that were computed from words. All else that is computed is an ordinary tensor.
    """

    places: Tensor | None
    reading: Reading

    @staticmethod
    def of(words: Tensor, reading: Reading, places: Tensor | None) -> Tokens:
        tokens = words.detach().clone().as_subclass(Tokens)
        tokens.reading, tokens.places = reading, places
        return tokens

    @staticmethod
    def whole(words: Tensor, reading: Reading) -> Tokens:
        """The input itself, (batch, T)."""
        return Tokens.of(words, reading, torch.arange(words.numel(), device=words.device).reshape(words.shape))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, Traced) for kind in types):
            return NotImplemented  # a product with vectors, and the like
        name = getattr(function, "__name__", str(function))
        if name == "__get__":
            name = property_name(function)
        if name in METADATA | PROPERTIES:
            return _plainly(function, args, kwargs)
        try:
            return _of_words(name, function, args, kwargs)
        except UnsupportedError as error:
            raise error if getattr(error, "located", False) else located(f"{_spoken(name)}: {error}") from None


CASTS = _names("long int to type cpu cuda detach data")  # which move nothing
WORD_VIEWS = VIEWS | CASTS | _names("view view_as reshape_as expand_as T mT")


def _of_words(name: str, function, args, kwargs):
    """What a function gives for word numbers."""
    if name == "__iter__":
        return iter(_of_words("unbind", torch.unbind, args, kwargs))
    words = [value for value in _flat((args, kwargs)) if isinstance(value, Tokens)]
    reading, first = words[0].reading, args[0] if args else None
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        raise UnsupportedError("word numbers are changed in place: make a new tensor of them")
    if name == "__getitem__" and isinstance(args[1], Tokens) and first.is_floating_point() and first.dim() == 2:
        return _of_words("embedding", F.embedding, (args[1], first), {})
    if name == "embedding_bag" and kwargs.get("padding_idx") is not None:
        reading.constants.append(plain_words(first) != kwargs["padding_idx"] % len(args[1]))
    if name in LOOKUPS and reading.builder is not None and isinstance(first, Tokens):
        if first.places is not None:
            return LOOKUPS[name](reading, *args, **kwargs)
        reading.look_up_computed(args[1] if len(args) > 1 else kwargs["weight"])
    plain_args, plain_kwargs = plain_words(args), plain_words(kwargs)
    result = _plainly(function, plain_args, plain_kwargs)
    moved = name in WORD_VIEWS and isinstance(first, Tokens) and first.places is not None
    if moved and all(_is_whole(part) for part in _flat(result)):
        if name not in CASTS:
            return _as_tokens(result, _plainly(function, (first.places, *plain_args[1:]), plain_kwargs), reading)
        return _as_tokens(result, first.places.to(result.device), reading)
    floats = any(isinstance(value, Tensor) and value.is_floating_point() for value in _flat((args, kwargs)))
    if name not in LOOKUPS:
        reading.constants.append([plain_words(word) for word in words] if floats else result)
    return _as_tokens(result, None, reading)


def _as_tokens(result, places, reading: Reading):
    """Whole numbers as tokens, at some places or, if that is None, at none."""
    if isinstance(result, Tensor):
        return Tokens.of(result, reading, places) if _is_whole(result) else result
    if not isinstance(result, (tuple, list)):
        return result
    parts = zip(result, places or [None] * len(result), strict=True)
    parts = [_as_tokens(*pair, reading) for pair in parts]
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)


def _is_whole(value) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def plain_words(value):
    """Word numbers, and what tuples and lists hold of them, as ordinary tensors."""
    if isinstance(value, Tokens):
        return value.as_subclass(Tensor)
    if isinstance(value, dict):
        return {key: plain_words(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        parts = [plain_words(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# What looks up vectors for word numbers: called with the reading and the call's arguments.
LOOKUPS: dict[str, Callable] = {}


def looked_up(reading: Reading, tokens: Tokens, weight: Tensor, max_norm: float | None = None) -> Symbol:
    """The vectors of some words, of the shape of ``tokens`` and an axis more."""
    return reading.look_up(weight, max_norm).view(lambda part: part.flatten(0, 1)[tokens.places.cpu()])


def _look_up(reading: Reading, tokens: Tokens, weight, padding_idx=None, max_norm=None, *args, **kwargs) -> Traced:
    return Traced.of(reading.builder, looked_up(reading, tokens, weight, max_norm), weight)


LOOKUPS["embedding"] = _look_up


class TracedModule:
    """A module and how it reads its input: what ``utils.certify.interface`` needs of it.

    Attributes:
        frames: the input as (batch, T, n): the sequence itself, the vectors of its words, or one frame of all values.
        softmax: name of the function that the forward ends with and the graph leaves out; "" if it has none.
        output_shape: of the outputs for a sample, which the graph has as one vector.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        outputs: Outputs = SCORES,
        check: bool = True,
        extra: Extra = NOTHING,
        alike: bool = False,
    ):
        """``check`` says whether the graph must be found to compute what the module does.

        ``extra`` are further arguments of the forward. ``alike`` promises that they are the same for all samples, and
        that the forward computes the same from all samples' word numbers; otherwise that must be seen at once.
        """
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError("a scripted module's forward cannot be read: give the module that it was made from")
        if x.dim() < 2 or len(x) == 0 or x[0].numel() == 0:
            raise ValueError(f"x must be (batch, T, n), (batch, n) or (batch, C, H, W), not {tuple(x.shape)}")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError("x must be finite floating-point numbers")
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"the model's parameter {name} is not finite")
        self.module, self.x, self.softmax, self.outputs, self.extra = module, x, "", outputs, extra
        like = next((value for value in module.parameters() if value.is_floating_point()), x)
        self.like = torch.empty(0, dtype=like.dtype, device=like.device)
        self.frames = x
        self.is_pure = True
        self._graphs: dict[tuple, Graph] | None = None
        self._reads_words = False  # something but their vectors
        self._plain = graph = self._trace("plane")
        if not alike and (self._reads_words or extra) and len(x) > 1 and not bool((x == x[:1]).all()):
            raise UnsupportedError(SEVERAL)
        if not x.is_floating_point():
            self.frames = self._table.detach()[x]
        else:
            self.frames = _frames(x)
        if check:
            self._check(graph)

    def graph(self, dtype: torch.dtype, relaxation: str) -> Graph:
        if self._graphs is None:
            return as_graph(self._trace(relaxation), dtype, self.frames.device)
        key = (dtype, relaxation, self.frames.device)
        if key not in self._graphs:
            traced = self._plain if relaxation == "plane" else self._trace(relaxation)
            self._graphs[key] = as_graph(traced, dtype, self.frames.device)
        return self._graphs[key]

    # --- readings that are kept: ``readings`` ---

    def keep_graphs(self) -> None:
        """From now on the module counts as it is, and graphs are made of it once."""
        self._graphs = {}

    def without_module(self) -> TracedModule:
        twin = copy.copy(self)
        twin.module = twin.x = twin.frames = None
        return twin

    @torch.no_grad()
    def for_input(self, module: nn.Module, x: Tensor) -> TracedModule | None:
        """The same reading for another input of the same shape; None if the module gives something else by now.

        That is seen at the first sample of the reading: to evaluate the graph takes longer than the module.
        """
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite floating-point numbers")
        sample, before = self._seen
        with user_defaults():
            now = self.outputs.of(module(sample)).to("cpu", torch.float64)
        if not self._is_same(now, before):
            return None
        twin = copy.copy(self)
        twin.module, twin.x, twin.frames = module, x, _frames(x)
        return twin

    def _trace(self, relaxation: str) -> Graph:
        builder = Builder(relaxation)
        tokens = not self.x.is_floating_point()
        if tokens:
            if self.x.dim() != 2 or self.x.dtype == torch.bool:
                raise ValueError(f"word numbers must be (batch, T), not {tuple(self.x.shape)} of {self.x.dtype}")
            given = twice(self.x)
            reading = Reading(builder, given.shape)
            given = Tokens.whole(given, reading)
        else:
            given = Traced.of(builder, builder.input(BATCH, self.x.shape[1:]), self.like)
        with kept(self.module) as keeper, user_defaults():
            held = keeper.held()
            earlier = f"; if it reads what an earlier call left in {', '.join(held)}, reset that" if held else ""
            try:
                with builder.lent():
                    output = self.extra.part([0] * BATCH).call(self.module, given)
            except UnsupportedError as error:
                raise UnsupportedError(f"{error}{earlier}") from error
            except (RuntimeError, IndexError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise UnsupportedError(
                    f"the forward fails on x of shape {tuple(self.x.shape)}: {reason}{earlier}"
                ) from error
        output = self.outputs.of(output)
        if not isinstance(output, Traced):
            raise UnsupportedError(f"the forward's result does not depend on the input{UNREAD if tokens else ''}")
        if tokens:
            self._table, self._reads_words = reading.table, bool(reading.constants)
        symbol, self.output_shape = output.symbol, output.shape[1:]
        if len(output.shape) == 0 or output.shape[0] != BATCH:
            raise UnsupportedError(f"the output must be (batch, ...), not of shape {tuple(output.shape)}")
        if not self.outputs.scores:
            symbol = SETTLE[0](builder, symbol)  # the values themselves are meant
        symbol, self.softmax = self.outputs.without_end(builder, symbol)
        return builder.finish(symbol.view(lambda part: part.reshape(BATCH, -1)))

    @torch.no_grad()
    def _check(self, graph: Graph) -> None:
        """The graph must compute what the module does, or the forward has done something behind its back."""
        some = self.x[:4] if not self.x.is_floating_point() else self.x[:4].to(self.like)
        with kept(self.module) as keeper, user_defaults():
            own = self.extra.part(slice(0, 4))
            expected, again = (self.outputs.of(own.call(self.module, some)) for _ in range(2))
            changed = keeper.changed()
        if changed and not torch.equal(expected, again):
            raise UnsupportedError(
                f"the forward carries a state from call to call, in {', '.join(changed)}: "
                "it must begin from the same state each time"
            )
        self.is_pure = not changed
        self._seen = some[:1].clone(), expected[:1].to("cpu", torch.float64)
        if not self.agrees(self.frames[:4], expected, graph):
            raise UnsupportedError(
                "the forward computes something else than what was read of it: it must not be random, "
                "depend on the input's values or on the size of the batch"
            )

    def agrees(self, frames: Tensor, expected: Tensor, graph: Graph | None = None) -> bool:
        """Whether the graph gives what the module does for some frames, but for rounding."""
        graph, expected = graph or self._plain, expected.to("cpu", torch.float64)
        found = graph.evaluate(frames.to("cpu", torch.float64)).reshape(-1, *self.output_shape)
        return self._is_same(ENDS[self.softmax](found), expected)

    def _is_same(self, found: Tensor, expected: Tensor) -> bool:
        """Whether outputs differ by no more than rounding may make of them."""
        room = SAME.get(self.like.dtype, SAME[torch.float32]) * (1.0 + expected.abs().amax())
        return expected.shape == found.shape and bool(((expected - found).abs() <= room).all())


def twice(words: Tensor) -> Tensor:
    """The first sample's words, for every sample that is traced."""
    return words[:1].expand(BATCH, -1)


def _frames(x: Tensor) -> Tensor:
    """The sequence itself, or all values as one frame, (batch, T, n)."""
    return x if x.dim() == 3 else x.flatten(1)[:, None]


@plain_state()
def trace(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, relaxation: str = "plane") -> Graph:
    """The graph of a module's forward.

    Args:
        module: anything that maps x to (batch, classes); in evaluation mode if it has dropout.
        x: an input, which also checks that the graph computes what the module does: (batch, T, n) for T frames of n
            values, (batch, T) of whole numbers for words whose embeddings are the frames, else any (batch, ...), which
            is one frame.

    Raises:
        UnsupportedError: the forward does something that has no bound here; the message has its line.
    """
    traced = TracedModule(usable_model(module), x, VALUES)
    if len(traced.output_shape) != 1:
        shape = (len(x), *traced.output_shape)
        raise UnsupportedError(f"the output must be (batch, classes), not of shape {shape}")
    return traced.graph(dtype, relaxation)
