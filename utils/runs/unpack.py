"""Files that gzip may have packed."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path


def unpacked(path: Path) -> bytes:
    """A file's bytes, unpacked if gzip has packed them. Raises ValueError if they cannot be."""
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: gzip cannot unpack it: {error}") from error
