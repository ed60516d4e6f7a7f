"""What is asked, before anything is answered: of which network and inputs, under which threat, which margins."""

from .question import Question
from .specification import margin_rows
from .threat import Frames, Threat, frame_mask

__all__ = ["Frames", "Question", "Threat", "frame_mask", "margin_rows"]
