"""How far a long call has come: a bar, or a call of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = bool | Callable[[int, int], object] | None


@contextmanager
def reported(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with the number of samples that were finished.

    Args:
        progress: None or False for silence, True for a bar on a terminal, or a function of the number of samples done
            and of all. What it raises ends the call.
    """
    finished = 0
    with tqdm(total=total, unit="sample", disable=None if progress is True else True) as bar:

        def done(count: int) -> None:
            nonlocal finished
            finished += count
            bar.update(count)
            if callable(progress):
                progress(finished, total)

        yield done
