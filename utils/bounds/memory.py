"""How many samples a device's memory takes at once, and what to do when it was less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..graph.graph import Graph
from .neurons.windows import BYTES, follows, image_shape

SHARE = 0.6  # of the free memory that a batch may take
# Blocks of coefficients that exist for a moment beside those that wait: parts of either sign, products, sums.
TEMPORARY = 3
WINDOW_BLOCKS = 12  # as large as the windows that are worked on at once: slopes, intercepts, parts, products
PER_NEURON = 24  # numbers kept for a neuron of a sample: bounds, slopes, intercepts and what they are made of
MEMORY_ERRORS = (MemoryError, RuntimeError)  # torch.OutOfMemoryError is a RuntimeError
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors that a CPU or a GPU raises if it has no memory left."""
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in words for text in OUT_OF_MEMORY)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be used on the device; None if it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(sizes[0]) if sizes else None


def waiting_columns(graph: Graph, target: int) -> int:
    """Most columns of coefficients that wait at once for their nodes in a backward pass from node ``target``."""
    waiting, most = {target: graph.nodes[target].size}, 0
    for node in reversed(graph.nodes[: target + 1]):
        if node.index in waiting:
            waiting |= {parent.index: parent.size for parent in node.parents}
            most = max(most, sum(waiting.values()))
            del waiting[node.index]
    return most


def bytes_per_sample(graph: Graph, num_rows: int, dtype: torch.dtype) -> int:
    """About the memory that bounding one more sample takes: an estimate from above of the peak."""
    rows = {graph.output.index: num_rows}
    for node in graph.nodes:
        for operand in node.relaxed_operands:
            if not follows(operand.bounded_through):  # whose windows are worked on in parts, however many they are
                rows[operand.bounded_through.index] = 2 * operand.bounded_through.size
    widest = max(node.size for node in graph.nodes)
    blocks = max(count * (waiting_columns(graph, index) + TEMPORARY * widest) for index, count in rows.items())
    return dtype.itemsize * (blocks + PER_NEURON * sum(node.size for node in graph.nodes))


def layer_table(graph: Graph, num_rows: int, dtype: torch.dtype) -> list[str]:
    """Of every layer that rows are bounded of: its size, and about what its coefficients take, a line each.

    ``num_rows`` are those of the specification, of the last layer. Memory is that of one sample, if all neurons have
    rows; windows of convolutions take theirs for all samples together.
    """
    rows = {graph.output: num_rows}
    for node in graph.nodes:
        for operand in node.relaxed_operands:
            rows[operand.bounded_through] = 2 * operand.bounded_through.size
    widest, lines = max(node.size for node in graph.nodes), []
    for node, count in sorted(rows.items(), key=lambda pair: pair[0].index):
        shape = image_shape(node)
        size = f"{node.size} values" if shape is None else "x".join(map(str, shape))
        how, taken = "rows", count * (waiting_columns(graph, node.index) + TEMPORARY * widest) * dtype.itemsize
        if node is not graph.output and follows(node):
            how, taken = "windows, in parts", WINDOW_BLOCKS * BYTES
        lines.append(f"{type(node).__name__} {size}: {count} {how}, {taken / 2**20:.1f} MiB")
    return lines


def samples_at_once(graph: Graph, num_rows: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Samples that fit into the device's free memory, at least 1; None if that cannot be told."""
    free = free_bytes(device)
    return None if free is None else max(1, int(SHARE * free / bytes_per_sample(graph, num_rows, dtype)))


class Parts:
    """Calls a function for parts of a batch, smaller ones from then on if the memory does not suffice."""

    def __init__(self) -> None:
        self.largest: int | None = None  # part known to be not too large, if one was

    def __call__(self, function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
        """``torch.cat`` of function(part of every tensor) over parts of at most ``size`` samples."""
        found, start = [], 0
        while start < len(tensors[0]) or not found:
            step = size if self.largest is None else min(size, self.largest)
            part = [tensor[start : start + step] for tensor in tensors]
            result = self._attempt(function, part)
            if result is None:
                self.largest = -(-len(part[0]) // 2)
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            else:
                found.append(result)
                start += step
        return found[0] if len(found) == 1 else torch.cat(found)

    @staticmethod
    def _attempt(function: Callable[..., Tensor], part: list[Tensor]) -> Tensor | None:
        """None if the memory does not suffice for several samples; its error keeps no tensor alive after this."""
        try:
            return function(*part)
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error) or len(part[0]) <= 1:
                raise
            return None
