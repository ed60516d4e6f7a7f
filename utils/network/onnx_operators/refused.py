"""What has no bound here, and why, in the words of its operators."""

from __future__ import annotations

# Of constants: no two implementations agree on them.
UNSURE = {"LRN", "Resize"}
MAXIMUM = "a maximum of perturbed values has no bound here: pool by the mean or the last state"
REASONS = (
    dict.fromkeys(("LpPool", "TopK"), MAXIMUM)
    | dict.fromkeys(("ArgMax", "ArgMin", "Hardmax"), "it gives the place of a maximum: export the scores themselves")
    | dict.fromkeys(("Attention", "MultiHeadAttention"), "attention multiplies perturbed values with each other")
)
EMBEDDING = "bounds are about vectors: export the network from the embedded vectors on, and give those as its input"
