"""The text data sets that there are scripts for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.text import TextData


@dataclass(frozen=True)
class TextTask:
    """What the scripts of a text data set have in common.

    Attributes:
        name: in script names; ``folder`` that of its models.
        source: the module and function, "data.news:load_news", that read the data.
        item: what a text is, for the user.
        epochs: passes over the training set, if not told otherwise.
    """

    name: str
    folder: str
    source: str
    item: str
    epochs: int

    def load(self, data_dir: Path | None, sample: bool) -> TextData:
        """The data, or the small built-in sample; imported only now, as they need more than a command line does."""
        module, _, function = self.source.partition(":")
        return getattr(import_module(module), function)(data_dir, sample)


def text_model_name(architecture: str, hidden_size: int, embedding_size: int) -> str:
    """Folder name of a text model: lstm_32 with vectors of 100 numbers, lstm_32_d50 with others."""
    return f"{architecture}_{hidden_size}" + (f"_d{embedding_size}" if embedding_size != 100 else "")


def speech_model_name(architecture: str, hidden_size: int, recipe: str | None = None) -> str:
    """Folder name of a classifier of spoken digits: lstm_32, or lstm_32_ibp_-50dB of certified training."""
    return "_".join([architecture, str(hidden_size), *([] if recipe is None else [recipe])])


QUESTIONS = TextTask("question", "question_classifier", "data.questions:load_questions", "question", epochs=15)
NEWS = TextTask("news", "news_classifier", "data.news:load_news", "news title", epochs=10)
