"""Numbers of changes in place of radii, where p = 0."""

from .search import search_counts

__all__ = ["search_counts"]
