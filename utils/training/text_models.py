"""Text classifiers: word vectors under a sequence classifier. The vectors are what is perturbed and certified.

A checkpoint is that of the sequence classifier, whose inputs are word vectors; its config also holds the vocabulary, a
list of words, and the embeddings, a (V, n) tensor of float16, in which they are trained to the end and measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.text import MAX_WORDS, PADDING, UNKNOWN, Vocabulary, pad, tokenize

from ..network.checkpoint import CheckpointError, Config, load_checkpoint
from ..network.models import SequenceClassifier


class TextNet(nn.Module):
    """What is trained: embeddings, dropout, and the classifier. Takes word numbers (N, T), padded by 0 at the end."""

    def __init__(self, embeddings: Tensor, classifier: SequenceClassifier, dropout: float, word_dropout: float):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embeddings, freeze=False, padding_idx=PADDING)
        self.classifier, self.word_dropout = classifier, word_dropout
        self.dropout = nn.Dropout(dropout)
        classifier.head.register_forward_pre_hook(lambda _, inputs: (self.dropout(inputs[0]),))

    def forward(self, numbers: Tensor) -> Tensor:
        lengths = (numbers != PADDING).sum(dim=1)
        numbers = numbers[:, : int(lengths.max())]
        if self.training and self.word_dropout:
            # Some words are read as unknown, so that the unknown word's vector learns to say nothing.
            dropped = torch.rand(numbers.shape, device=numbers.device) < self.word_dropout
            numbers = numbers.masked_fill(dropped & (numbers != PADDING), UNKNOWN)
        return self.classifier(self.dropout(self.embedding(numbers)), lengths)


@dataclass
class TextModel:
    """A trained text classifier.

    Attributes:
        classifier: takes word vectors (batch, T, n) and lengths (batch,).
        embeddings: (V, n) vectors of the vocabulary's words, float32.
    """

    classifier: SequenceClassifier
    config: Config
    vocabulary: Vocabulary
    embeddings: Tensor

    def encode(self, token_lists: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Word numbers (N, T) and lengths (N,)."""
        return pad([self.vocabulary.encode(tokens) for tokens in token_lists])

    def embed(self, numbers: Tensor) -> Tensor:
        """Word vectors (N, T, n) of word numbers."""
        return self.embeddings[numbers]

    @torch.no_grad()
    def predict(self, numbers: Tensor, lengths: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Classes (N,)."""
        classifier = self.classifier.to(dtype)
        predictions = [
            classifier(self.embed(rows).to(dtype), counts).argmax(dim=1)
            for rows, counts in zip(numbers.split(500), lengths.split(500), strict=True)
        ]
        self.classifier.to(self.embeddings.dtype)
        return torch.cat(predictions)


def tokens_of(text: str) -> list[str]:
    """Tokens of a text to be certified. Raises ValueError if there are none, or too many to certify one by one."""
    tokens = tokenize(text)
    if len(tokens) > MAX_WORDS:
        raise ValueError(f"the text has {len(tokens)} words and signs, more than the {MAX_WORDS} that are certified")
    return tokens


def load_text_model(path: Path, device: torch.device | str = "cpu") -> TextModel:
    """Read a checkpoint with vocabulary and embeddings.

    Raises:
        CheckpointError: it is missing, damaged, or holds no text classifier.
    """
    classifier, config = load_checkpoint(path, device)
    words, embeddings = config.get("vocabulary"), config.get("embeddings")
    if not isinstance(words, list) or not isinstance(embeddings, Tensor):
        raise CheckpointError(f"{path} is no text classifier: its config lacks vocabulary or embeddings")
    try:
        vocabulary = Vocabulary(words)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not usable: {error}") from error
    if embeddings.shape != (len(words), config["input_size"]) or not bool(embeddings.isfinite().all()):
        raise CheckpointError(f"{path} is not usable: embeddings of {tuple(embeddings.shape)} for {len(words)} words")
    names = config.get("class_names")
    if not isinstance(names, (list, tuple)) or len(names) != config["num_classes"]:
        raise CheckpointError(
            f"{path} is not usable: its config lacks the names of the {config['num_classes']} classes"
        )
    return TextModel(classifier, config, vocabulary, embeddings.to(device, torch.float32))
