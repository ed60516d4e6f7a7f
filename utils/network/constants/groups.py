"""Batches whose samples have constants of their own: those that have the same ones have one graph.

Whatever a forward computes from word numbers alone, such as masks, lengths and the order of packing, is constant for
each sample, like its further arguments. A short run of the forward on each sample's own word numbers says what that is;
samples for which all of it is equal, to the last bit, are read together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...graph.graph import Graph
from ..kept import kept
from ..outputs import SCORES, Outputs
from ..state import user_defaults
from ..symbolic import UnsupportedError
from ..trace import SEVERAL, Reading, Tokens, TracedModule, twice
from .extra import NOTHING, Extra, key_of

CHECKED = 64  # samples of a batch that are compared with the module's result for the batch


class SeveralReadings(TracedModule):
    """The readings of one module for a batch whose samples are not all alike.

    Attributes:
        readings: of every group, and ``group``, (batch,), the number of the one that each sample belongs to.
        frames: of the whole batch, (batch, T, n).
    """

    def __init__(self, readings: list[TracedModule], group: Tensor, frames: Tensor):
        first = readings[0]
        self.readings, self.group, self.frames = readings, group, frames
        self.softmax, self.outputs, self.output_shape, self.like = "", first.outputs, first.output_shape, first.like

    def graph(self, dtype: torch.dtype, relaxation: str) -> Graph:
        raise UnsupportedError(SEVERAL)

    def part(self, samples: Tensor | slice) -> TracedModule:
        """What is read of some samples: one reading, if these are alike."""
        group = self.group[samples.cpu() if isinstance(samples, Tensor) else samples]
        if len(group) and bool((group == group[0]).all()):
            return self.readings[int(group[0])]
        return SeveralReadings(self.readings, group, self.frames[samples])

    def groups(self) -> list[tuple[Tensor, TracedModule]]:
        """The samples of each group, and their reading."""
        numbers = self.group.unique().tolist()
        return [((self.group == number).nonzero().squeeze(-1), self.readings[number]) for number in numbers]


def groups_of(network: object, batch: int) -> list[tuple[Tensor, object]]:
    """Numbers of samples that are alike, and what is read of them; all at once, but for ``SeveralReadings``."""
    return network.groups() if isinstance(network, SeveralReadings) else [(torch.arange(batch), network)]


def read_alike(
    module: nn.Module, x: Tensor, outputs: Outputs = SCORES, check: bool = True, extra: Extra = NOTHING
) -> TracedModule:
    """What is read of a module for a batch, whether its samples are alike or not; see ``TracedModule``."""
    keys = _constants(module, x, extra)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) <= 1:
        return TracedModule(module, x, outputs, check, extra, alike=True)
    group = torch.tensor([numbers[key] for key in keys])
    readings, order = [], []
    for number in range(len(numbers)):
        members = (group == number).nonzero().squeeze(-1)
        one = TracedModule(module, x[members.to(x.device)], outputs, check, extra.part(members), alike=True)
        readings.append(one)
        order.append(members)
    frames = torch.cat([one.frames for one in readings])[torch.cat(order).argsort().to(x.device)]
    several = SeveralReadings(readings, group, frames)
    if check:
        _check_together(several, module, x, extra)
    return several


@torch.no_grad()
def _constants(module: nn.Module, x: Tensor, extra: Extra) -> list[tuple]:
    """For every sample what its constants are, comparable."""
    if x.dim() < 2 or len(x) == 0:
        return []
    tokens = not x.is_floating_point() and x.dim() == 2 and x.dtype != torch.bool
    if not tokens and not extra:
        return [()]
    keys, known = [], {}
    for sample in range(len(x)):
        own = extra.key(sample)
        if tokens:
            row = (own, key_of(x[sample]))
            if row not in known:
                known[row] = _computed(module, x[sample : sample + 1], extra.part([sample, sample]))
            if not known[row] and not extra:
                return [()]  # nothing is computed from words, of this sample and so of none
            own = (*own, *known[row])
        keys.append(own)
    return keys


def _computed(module: nn.Module, words: Tensor, extra: Extra) -> tuple:
    """All that the forward computes from one sample's word numbers."""
    given = twice(words)
    reading = Reading(None, given.shape)
    with kept(module), user_defaults():
        try:
            extra.call(module, Tokens.whole(given, reading))
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError):
            return (key_of(words),)  # not known; the reading says what is wrong
    return tuple(map(key_of, reading.constants))


@torch.no_grad()
def _check_together(several: SeveralReadings, module: nn.Module, x: Tensor, extra: Extra) -> None:
    """What the module gives for the batch must be what it gives for each sample, or masks are those of others."""
    some = x[:CHECKED] if not x.is_floating_point() else x[:CHECKED].to(several.like)
    part = slice(0, CHECKED)
    with kept(module), user_defaults():
        expected = several.outputs.of(extra.part(part).call(module, some))
    for members, reading in several.groups():
        own = members[members < CHECKED]
        if len(own) and not reading.agrees(several.frames[own], expected[own]):
            raise UnsupportedError(
                "the forward computes something else for a batch than for its samples one by one: their masks or "
                "lengths are mixed"
            )
