"""Verdicts on spoken digits: is a GRU's class the same under any noise of a level, on the waveform itself?

    python gru/bound_gru_speech.py                              # 100 utterances, noise of -90 dB on every sample
    python gru/bound_gru_speech.py --threat snr --level 40      # noise of a signal-to-noise ratio
    python gru/bound_gru_speech.py --level -40 --span 0.1 0.15  # a span of time only
    python gru/bound_gru_speech.py --N 20 --search --draw 3     # the loudest noise that is certified, and that breaks

Reads WORK_DIR/gru_32/gru (after --hidden-size); writes a row for every utterance (certified_bound.csv), run.json and
figures to noise_-90_norm_bound_crown/ (after threat, level and method) beside it, and waveforms that break it to
falsified/ in there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.speech.arguments import add_speech_bound_arguments


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_speech_bound_arguments(parser, "gru")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.speech.bound import bound_speech_classifier


def main() -> None:
    bound_speech_classifier(get_args(), "gru")


if __name__ == "__main__":
    run_main(main)
