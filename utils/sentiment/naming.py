"""Names of the model folders, by what a checkpoint's config says or the flags of a script ask for."""

from __future__ import annotations

from typing import Any

EMBEDDING_SIZE = 64  # unless told otherwise


def model_name(config: dict[str, Any]) -> str:
    """lstm_64, transformer_1_64 (layers, width); with vectors of n numbers, not 64, _dn; and what else is special."""
    transformer = config["architecture"] == "transformer"
    sizes = [config["num_layers"], config["width"]] if transformer else [config["hidden_size"]]
    words = [config["architecture"], *map(str, sizes)]
    words += [f"d{config['input_size']}"] * (config["input_size"] != EMBEDDING_SIZE)
    if transformer:
        words += ["positions"] * (config["max_frames"] is not None)
        words += ["standard"] * (config["layer_norm"] == "standard")
    return "_".join([*words, *filter(None, [config.get("recipe")])])
