"""Classifiers of waveforms: features of speech as layers of the network."""

from .features import MelFeatures, SpeechClassifier, check_features, hann

__all__ = ["MelFeatures", "SpeechClassifier", "check_features", "hann"]
