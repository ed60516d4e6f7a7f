"""Results as arrays, as rows for a table, and as JSON.

Radii and margins are tensors, bounds of outputs are pairs of these, or tuples and dicts of pairs, radius searches are
dataclasses: all of them are taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def to_arrays(result: Any) -> Any:
    """The same as NumPy arrays: of a tensor one, else a dict of them, by the names or numbers of the parts."""
    if isinstance(result, Tensor):
        return result.detach().cpu().numpy()
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: to_arrays(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if hasattr(result, "_asdict"):
        result = result._asdict()
    elif isinstance(result, (tuple, list)) and any(not isinstance(part, (int, float)) for part in result):
        result = dict(enumerate(result))
    if isinstance(result, Mapping):
        return {name: to_arrays(part) for name, part in result.items()}
    return np.asarray(result)


def to_rows(**columns: Any) -> list[dict[str, Any]]:
    """A row a sample, a dict of plain numbers: what ``pandas.DataFrame`` and ``csv.DictWriter`` take.

    Args:
        columns: results or other values whose first axis is the batch, by name. A column with more axes is several,
            such as ``margin[0]`` or ``steps[1,2]``; the parts of bounds, tuples and dicts are ``name.part``.

    Raises:
        ValueError: they are not all of as many samples.
    """
    flat: dict[str, np.ndarray] = {}
    for name, value in columns.items():
        _flatten(name, to_arrays(value), flat)
    counts = {name: len(values) for name, values in flat.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns must be of as many samples each, not {counts}")
    return [
        dict(zip(flat, row, strict=True)) for row in zip(*(column.tolist() for column in flat.values()), strict=True)
    ]


def _flatten(name: str, value: Any, flat: dict[str, np.ndarray]) -> None:
    if isinstance(value, dict):
        for part, own in value.items():
            _flatten(f"{name}.{part}", own, flat)
    elif value.ndim == 0:
        raise ValueError(f"column {name} has no axis of samples")
    elif value.ndim == 1:
        flat[name] = value
    else:
        for place in np.ndindex(value.shape[1:]):
            flat[f"{name}[{','.join(map(str, place))}]"] = value[(slice(None), *place)]


def to_json(result: Any, **options: Any) -> str:
    """Rows, or any result, as JSON; what it has no number for are the strings "inf", "-inf" and "nan".

    ``options`` are those of ``json.dumps``, such as ``indent``.
    """
    return json.dumps(_plain(result), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_asdict"):
        return [_plain(part) for part in value]
    arrays = value if isinstance(value, (np.ndarray, np.generic)) else to_arrays(value)
    return _plain(arrays.tolist() if isinstance(arrays, (np.ndarray, np.generic)) else arrays)
