"""What comes out of long calls: how far they are, and their results in other forms."""

from .progress import Progress, reported
from .rows import to_arrays, to_json, to_rows

__all__ = ["Progress", "reported", "to_arrays", "to_json", "to_rows"]
