"""Sentences by their sentiment, and what replacing words can do to it: training, bounds and what is reported."""
