"""Bounds of single steps, words and pen strokes, and what is reported of them."""
