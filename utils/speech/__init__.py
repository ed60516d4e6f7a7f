"""Bounds of spoken digits: noise on waveforms, spans of time, and balls around features."""
