"""Training: the loop, its schedule and evaluation, for images, texts and strokes."""
