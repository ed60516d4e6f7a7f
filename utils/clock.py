"""Time limits that hold: a piece of work is begun only if it would end before the deadline.

Everything that has a deadline asks ``now()``; a test can put a clock of its own in the place of ``CLOCK``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CLOCK = time.perf_counter


def now() -> float:
    """Seconds since some moment; deadlines are in terms of it."""
    return CLOCK()


@dataclass
class Pace:
    """How long pieces of one kind of work take, and whether others would end in time.

    Attributes:
        deadline: ``now()`` at which all has to have ended.
        longest: seconds that a piece took at most so far, or is expected to take.
    """

    deadline: float = math.inf
    longest: float = 0.0

    def allows(self, pieces: float = 1.0) -> bool:
        return now() + pieces * self.longest < self.deadline

    @contextmanager
    def work(self, pieces: float = 1.0) -> Iterator[None]:
        """Times what is done inside, so many pieces."""
        began = now()
        yield
        self.longest = max(self.longest, (now() - began) / pieces)


def share_of(deadline: float, share: float) -> float:
    """An earlier deadline, which leaves the rest of the time."""
    at = now()
    return at + share * (deadline - at) if deadline < math.inf else deadline
