"""Tables of what users choose by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PACKAGE = __name__.split(".")[0]  # utils, or what an installation calls it


class Registry(dict):
    """Things by name, in the order in which they are offered; a new one is an entry more.

    An entry is the thing itself, or text "package.module:name" that says where in this collection it is: that is
    imported when the thing is first asked for, so that the names alone cost nothing.
    """

    def __init__(self, kind: str, entries: dict[str, Any]):
        super().__init__(entries)
        self.kind = kind

    def check(self, name: str) -> str:
        """The name. Raises ValueError, with the names that there are, if it is none of them."""
        if name not in self:
            raise ValueError(f"{self.kind} must be one of {', '.join(self)}, not {name!r}")
        return name

    def __getitem__(self, name: str) -> Any:
        entry = super().__getitem__(self.check(name))
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self[name] = getattr(import_module(f".{module}", PACKAGE), attribute)
        return entry
