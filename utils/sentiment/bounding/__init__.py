"""Bounds over the replacement of words: questions, result files and what is shown of them."""
