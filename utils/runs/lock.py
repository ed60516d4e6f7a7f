"""A lock on a folder, so that two runs do not write to it at the same time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not kept apart there
    fcntl = None

LOCK_NAME = ".lock"


class LockedError(ValueError):
    """Another run holds the folder; the message names both."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it when the process ends, however it does.

    Raises:
        LockedError: another process holds it.
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_NAME
    descriptor = _acquire(path)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed, by the process that held it, after it was opened here.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            holder = path.read_text(errors="replace") if path.exists() else ""
            os.close(descriptor)
            raise LockedError(f"{path.parent} is in use by another run ({holder or 'unknown'})") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
