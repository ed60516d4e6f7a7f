"""Convolutional classifiers of images, from a few layers to the residual and dense kinds of CIFAR-10's literature.

All take images in [0, 1], (batch, channels, size, size), and normalise them themselves, so that a perturbation is
measured in pixel values. ``width`` scales the channels of a kind.

- small, large: Wong and Kolter's (2018): strided convolutions and linear layers.
- cnn7: five 3 x 3 convolutions and two linear layers, normalised: what certified training is mostly measured on.
- resnet: three residual blocks without normalisation unless asked for; small.
- densenet, resnext, wide_resnet: of the published kinds for images of 32 x 32, with fewer blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..choices.tables import CNN_WIDTHS

ALWAYS_NORMALISED = ("cnn7", "densenet", "resnext", "wide_resnet")
CNN_KINDS = tuple(CNN_WIDTHS)


class ImageClassifier(nn.Module):
    """Logits, (batch, classes), of images, (batch, channels, height, width).

    Args:
        layers: what takes the normalised images.
        mean, std: numbers or one for each channel, subtracted from and divided into the images.
    """

    def __init__(self, layers: nn.Module, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0):
        super().__init__()
        self.layers = layers
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value).float().reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) != 4:  # three axes would be read as a sequence, with a ball around every frame
            raise ValueError(f"images must be (batch, channels, height, width), not {tuple(x.shape)}")
        return self.layers((x - self.mean) / self.std)


def make_cnn(
    kind: str,
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    width: int | None = None,
    batch_norm: bool = False,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> ImageClassifier:
    """An untrained network of a kind (``CNN_KINDS``) for square images.

    Args:
        width: channels of the first layers; None for the kind's own. densenet's growth rate.
        batch_norm: normalise after every convolution and hidden linear layer; some kinds always do.

    Raises:
        ValueError: no such kind, or images too small for it.
    """
    if kind not in CNN_WIDTHS:
        raise ValueError(f"the kind of network must be one of {', '.join(CNN_KINDS)}, not {kind!r}")
    width = CNN_WIDTHS[kind] if width is None else width
    with torch.device("meta"):
        probe = BODIES[kind](Layers(False), channels, width)
        try:
            features = probe(torch.zeros(1, channels, size, size)).shape[1]
        except RuntimeError:
            raise ValueError(f"images of {size} x {size} are too small for {kind}") from None
    layers = Layers(batch_norm or kind in ALWAYS_NORMALISED)
    body = BODIES[kind](layers, channels, width)
    head = layers.head(features, HIDDEN[kind](width), classes)
    return ImageClassifier(nn.Sequential(*body, *head), mean, std)


class Layers:
    """Convolutions and linear layers, each normalised and followed by a relu unless told otherwise."""

    def __init__(self, normalised: bool):
        self.normalised = normalised

    def conv(
        self, start: int, end: int, kernel: int = 3, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> nn.Sequential:
        """A convolution that keeps the size of images, but for its stride."""
        padding = (kernel - 1) // 2
        conv = nn.Conv2d(start, end, kernel, stride, padding, groups=groups, bias=not self.normalised)
        return nn.Sequential(conv, *self.norm(end), *[nn.ReLU()] * relu)

    def norm(self, channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if self.normalised else []

    def head(self, features: int, hidden: Sequence[int], classes: int) -> list[nn.Module]:
        """Linear layers over ``features`` values."""
        made: list[nn.Module] = []
        for end in hidden:
            made.append(nn.Linear(features, end, bias=not self.normalised))
            made += [nn.BatchNorm1d(end)] if self.normalised else []
            made.append(nn.ReLU())
            features = end
        return [*made, nn.Linear(features, classes)]


def _small(layers: Layers, channels: int, w: int) -> nn.Sequential:
    return nn.Sequential(layers.conv(channels, w, 4, 2), layers.conv(w, 2 * w, 4, 2), nn.Flatten())


def _large(layers: Layers, channels: int, w: int) -> nn.Sequential:
    first = layers.conv(channels, w), layers.conv(w, w, 4, 2)
    return nn.Sequential(*first, layers.conv(w, 2 * w), layers.conv(2 * w, 2 * w, 4, 2), nn.Flatten())


def _cnn7(layers: Layers, channels: int, w: int) -> nn.Sequential:
    first = layers.conv(channels, w), layers.conv(w, w)
    strided = layers.conv(w, 2 * w, stride=2)
    return nn.Sequential(*first, strided, layers.conv(2 * w, 2 * w), layers.conv(2 * w, 2 * w), nn.Flatten())


def _resnet(layers: Layers, channels: int, w: int) -> nn.Sequential:
    blocks = Residual(layers, w, w, 2), Residual(layers, w, 2 * w, 2), Residual(layers, 2 * w, 2 * w)
    return nn.Sequential(layers.conv(channels, w), *blocks, nn.Flatten())


def _densenet(layers: Layers, channels: int, growth: int, blocks: Sequence[int] = (2, 4, 4)) -> nn.Sequential:
    made: list[nn.Module] = [nn.Conv2d(channels, 2 * growth, 3, padding=1, bias=False)]
    width = 2 * growth
    for number, count in enumerate(blocks):
        made += [Dense(layers, width + index * growth, growth) for index in range(count)]
        width += count * growth
        if number < len(blocks) - 1:
            made.append(Before(layers, width, width // 2, 1))
            made.append(nn.AvgPool2d(2))
            width //= 2
    return nn.Sequential(*made, *layers.norm(width), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())


def _resnext(layers: Layers, channels: int, w: int) -> nn.Sequential:
    blocks = (
        Residual(layers, w, 2 * w, 1, groups=2),
        Residual(layers, 2 * w, 4 * w, 2, groups=2),
        Residual(layers, 4 * w, 8 * w, 2, groups=2),
    )
    return nn.Sequential(layers.conv(channels, w, 1), *blocks, nn.AvgPool2d(4), nn.Flatten())


def _wide_resnet(layers: Layers, channels: int, w: int) -> nn.Sequential:
    stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    blocks = Wide(layers, 16, w, 1), Wide(layers, w, 2 * w, 2), Wide(layers, 2 * w, 4 * w, 2)
    return nn.Sequential(stem, *blocks, *layers.norm(4 * w), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())


BODIES: dict[str, Callable[[Layers, int, int], nn.Sequential]] = {
    "small": _small,
    "large": _large,
    "cnn7": _cnn7,
    "resnet": _resnet,
    "densenet": _densenet,
    "resnext": _resnext,
    "wide_resnet": _wide_resnet,
}
# Sizes of the hidden linear layers; with a kind's own width the published ones.
HIDDEN: dict[str, Callable[[int], tuple[int, ...]]] = {
    "small": lambda w: (100 * w // 16,),
    "large": lambda w: (16 * w, 16 * w),
    "cnn7": lambda w: (8 * w,),
    "resnet": lambda w: (100 * w // 16,),
    **dict.fromkeys(("densenet", "resnext", "wide_resnet"), lambda w: ()),
}


class Residual(nn.Module):
    """relu(f(x) + g(x)): two convolutions, or a bottleneck of grouped ones, beside x or a 1 x 1 convolution of it."""

    def __init__(self, layers: Layers, start: int, end: int, stride: int = 1, groups: int = 1):
        super().__init__()
        if groups == 1:
            parts = layers.conv(start, end, 3, stride), layers.conv(end, end, relu=False)
        else:
            inner = layers.conv(start, end // 2, 1), layers.conv(end // 2, end // 2, 3, stride, groups)
            parts = *inner, layers.conv(end // 2, end, 1, relu=False)
        self.layers = nn.Sequential(*parts)
        same = stride == 1 and start == end
        self.beside = nn.Identity() if same else layers.conv(start, end, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.beside(x))


class Before(nn.Sequential):
    """A convolution whose normalisation and relu come before it."""

    def __init__(self, layers: Layers, start: int, end: int, kernel: int = 3, stride: int = 1):
        conv = nn.Conv2d(start, end, kernel, stride, (kernel - 1) // 2, bias=False)
        super().__init__(*layers.norm(start), nn.ReLU(), conv)


class Dense(nn.Module):
    """Channels that a bottleneck adds to those that it reads (Huang et al. 2017)."""

    def __init__(self, layers: Layers, start: int, growth: int):
        super().__init__()
        self.layers = nn.Sequential(Before(layers, start, 4 * growth, 1), Before(layers, 4 * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.layers(x)), dim=1)


class Wide(nn.Module):
    """A residual block with its normalisations first (Zagoruyko and Komodakis 2016)."""

    def __init__(self, layers: Layers, start: int, end: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(Before(layers, start, end, 3, stride), Before(layers, end, end))
        self.beside = nn.Conv2d(start, end, 1, stride, bias=False) if stride > 1 or start != end else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.beside(x)
