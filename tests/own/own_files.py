"""A model, its weights and data in files, as a user has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.own.loading import load_model

MODEL = """
import torch
from torch import nn

from scale import FACTOR


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.rnn(FACTOR * x)[0][:, -1])


def one_score():
    torch.manual_seed(1)
    return nn.Sequential(Net(1), nn.Sigmoid())


class Padded(Net):
    # Of sequences whose lengths come as a second argument, what is added to all scores as a third.
    def forward(self, x, lengths, shift):
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        states = self.rnn(FACTOR * x)[0] * mask[..., None]
        return self.head(states.sum(dim=1) / lengths[:, None]) + shift


NUMBER = 3
"""
LENGTHS = (4, 2, 3, 2, 4)
SHIFT = (0.1, 0.0, -0.1)


def write_files(folder: Path) -> tuple[Path, tuple, nn.Module, Tensor, Tensor]:
    """The folder, the flags that name model and weights, the model, inputs and labels, of which one is wrong."""
    (folder / "my_model.py").write_text(MODEL)
    (folder / "scale.py").write_text("FACTOR = 1.5\n")
    torch.manual_seed(0)
    model = load_model(f"{folder / 'my_model.py'}:Net")
    torch.save(model.state_dict(), folder / "w.pt")
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    labels = model(torch.from_numpy(x)).argmax(dim=1)
    labels[3] = (labels[3] + 1) % 3  # misclassified
    np.save(folder / "x.npy", x)
    np.savez(folder / "more.npz", lengths=np.array(LENGTHS), shift=np.array(SHIFT))
    np.savez(folder / "both.npz", x=x, y=labels.numpy())
    np.savetxt(folder / "y.csv", labels.numpy(), fmt="%d", header="label", comments="")
    np.savetxt(folder / "flat.csv", x.reshape(5, -1), delimiter=",", header=",".join("abcdefghijkl"), comments="")
    flags = ("--model", f"{folder / 'my_model.py'}:Net", "--weights", folder / "w.pt")
    return folder, flags, model, torch.from_numpy(x), labels
