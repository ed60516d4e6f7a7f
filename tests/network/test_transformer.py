"""The Transformer's forward against its equations, its symmetries, and its checkpoints."""

import math

import pytest
import torch

from utils.network import build_model, load_checkpoint, save_checkpoint
from utils.network.transformer import SequenceTransformer

CONFIG = {
    "architecture": "transformer",
    "input_size": 3,
    "num_classes": 2,
    "width": 8,
    "heads": 2,
    "inner": 5,
    "num_layers": 2,
    "layer_norm": "no-variance",
    "max_frames": None,
}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = build_model(CONFIG | changes).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model.requires_grad_(False)


def normalised(layer, x, standard):
    centred = x - x.mean()
    if standard:
        centred = centred / math.sqrt(float((centred**2).mean()) + 1e-12)
    return layer.weight * centred + layer.bias


def by_loops(model, x, standard):
    """Logits of one sequence, (T, n), row by row, every row of every layer."""
    rows = [model.first, *x, model.last]
    if model.places is not None:
        rows = [row + model.places[number] for number, row in enumerate(rows)]
    rows = [normalised(model.entry_norm, model.entry.weight @ row + model.entry.bias, standard) for row in rows]
    for layer in model.layers:
        made = []
        queries, keys, values = ([part(row) for row in rows] for part in (layer.query, layer.key, layer.value))
        for row, query in zip(rows, queries, strict=True):
            context = []
            for head in range(layer.heads):
                of = slice(head * layer.size, (head + 1) * layer.size)
                weights = torch.stack([query[of] @ key[of] / math.sqrt(layer.size) for key in keys]).softmax(0)
                context.append(sum(w * value[of] for w, value in zip(weights, values, strict=True)))
            row = normalised(layer.attention_norm, row + layer.out(torch.cat(context)), standard)
            inner = layer.inner(row).clamp(min=0.0)
            made.append(normalised(layer.output_norm, row + layer.outer(inner), standard))
        rows = made
    return model.head(torch.tanh(model.pooler(rows[0])))


@pytest.mark.parametrize("layer_norm", ["no-variance", "standard"])
@pytest.mark.parametrize("places", [None, 6])
def test_forward_is_the_equations(layer_norm, places):
    model = make(layer_norm=layer_norm, max_frames=places)
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    expected = torch.stack([by_loops(model, one, layer_norm == "standard") for one in x])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    other = torch.stack([by_loops(model, one, layer_norm != "standard") for one in x])
    assert (model(x) - other).abs().max() > 1e-2


def test_order_of_words_counts_only_with_places():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    turned = x.flip(1)
    assert torch.allclose(make()(x), make()(turned), atol=1e-12)
    with_places = make(max_frames=5)
    assert (with_places(x) - with_places(turned)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="longer than the 5"):
        with_places(torch.zeros(1, 6, 3, dtype=torch.float64))


def test_a_batch_is_as_one_by_one():
    model, x = make(), torch.randn(4, 3, 3, dtype=torch.float64)
    assert torch.allclose(model(x), torch.cat([model(one[None]) for one in x]), atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"layer_norm": "standard", "max_frames": 7}])
def test_checkpoint(tmp_path, changes):
    config = CONFIG | changes
    model = build_model(config)
    save_checkpoint(tmp_path / "transformer", model, config)
    again, read = load_checkpoint(tmp_path / "transformer")
    assert read == config and isinstance(again, SequenceTransformer)
    x = torch.randn(2, 4, 3)
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"heads": 3}, "heads"),
        ({"width": 0}, "width"),
        ({"layer_norm": "other"}, "layer_norm"),
        ({"max_frames": 0}, "max_frames"),
        ({"num_layers": 1.0}, "num_layers"),
    ],
)
def test_bad_config(changes, part):
    with pytest.raises(ValueError, match=part):
        build_model(CONFIG | changes)
    config = {key: value for key, value in CONFIG.items() if key != part}
    with pytest.raises(ValueError, match=f"lacks {part}"):
        build_model(config)
