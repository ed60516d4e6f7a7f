"""More of torch's functions that the reading of a forward knows, a line or two each, in modules by kind."""

from . import arrangement, attention, functions, norms, sequences  # noqa: F401
