"""What a module's forward keeps and depends on: put back after it was read, and compared before it is trusted again."""

from .fingerprint import Unknown, fingerprint
from .keeping import kept

__all__ = ["Unknown", "fingerprint", "kept"]
