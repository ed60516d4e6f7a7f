"""The committed models: they read sentences, and what certified training is for can be seen on one."""

import pytest
import torch
from mnist_files import ROOT

from utils.sentiment.bounding.bounds import lowest_margins
from utils.training.text_models import load_text_model

FOLDER = ROOT / "models" / "sentiment_classifier"
PATHS = sorted(path for path in FOLDER.glob("*/*") if path.suffix == "" and path.is_file())
WORDS = ["a", "lovely", "film", "with", "strong", "performances"]
SUBSTITUTES = {"lovely": ["charming", "gorgeous"], "film": ["movie"], "strong": ["powerful", "vigorous"]}


def margins_of(name, architecture):
    """Of the sentence's own class, and the lower bounds at budgets 1 and 3."""
    model = load_text_model(FOLDER / name / architecture)
    numbers = torch.tensor([model.vocabulary.encode(WORDS)])
    choices = torch.tensor([[(model.vocabulary.encode(SUBSTITUTES.get(word, [])) + [0, 0])[:2] for word in WORDS]])
    x, vectors = model.embeddings[numbers].double(), model.embeddings[choices].double()
    classifier = model.classifier.double().requires_grad_(False)
    logits = classifier(x)[0]
    bounds = lowest_margins(classifier, x, torch.tensor([1]), vectors, choices != 0, [1, 3], "crown-ibp")[0]
    return float(logits[1] - logits[0]), bounds


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)
def test_models_are_read(path):
    model = load_text_model(path)
    assert path.name == model.config["architecture"] and model.config["test_accuracy"] > 0.78
    for text, label in (("a warm and moving film .", 1), ("a dull , lifeless mess .", 0)):
        vectors = model.embeddings[model.vocabulary.encode(text.split())][None]
        assert int(model.classifier(vectors).argmax()) == label


def test_a_certified_transformer_is_certified_where_a_plain_one_is_not():
    plain, certified = (margins_of(name, "transformer") for name in ("transformer_1_64", "transformer_1_64_ibp"))
    assert certified[1][1] > 0 and certified[0] >= certified[1][0] >= certified[1][1]
    assert plain[0] > 0 and plain[1][1] < 0
