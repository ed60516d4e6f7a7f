"""How the checker's margins compare with those of the run that wrote the certificates, for replaced words.

    python lstm/bound_lstm_sentiment.py --methods crown --batch-size 1 --save-certificate
    python benchmarks/check_sentence_certificates.py models/sentiment_classifier/lstm_64/substitution_bound_crown

Prints a row for every budget: certificates, how many scripts/check_certificate.py confirms, and how many copies, with
hashes made anew, in which label and target are exchanged; the least and greatest of the checker's margin less the
run's; and processor time a certificate, comparable within one table only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "scripts"))

from utils.runs.cli import ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="results of a run with --save-certificate")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import check_certificate as checker
import numpy as np

from utils.certify.certificate import FOLDER_NAME
from utils.experiments.tables import markdown_table
from utils.runs.results import CSV_NAME
from utils.runs.rows import read_rows
from utils.sentiment.bounding.rows import SentenceRow


def margin_of(path: Path, weights: Path) -> float | None:
    """The checker's margin; None of a file that it rejects."""
    try:
        return checker.check(path, weights)[2]
    except checker.Rejected:
        return None


def with_classes_exchanged(path: Path, folder: Path) -> Path:
    """A copy that states what is false, with hashes that fit."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    header["label"], header["targets"][0] = header["targets"][0], header["label"]
    header["sha256"] = checker.hash_arrays(arrays, {key: value for key, value in header.items() if key != "sha256"})
    copy = folder / path.name
    np.savez(copy, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return copy


def main() -> None:
    args = get_args()
    rows, _ = read_rows(args.folder / CSV_NAME, SentenceRow)
    certificates, table = args.folder / FOLDER_NAME, []
    for budget in dict.fromkeys(row.budget for row in rows):
        written = [
            (row, certificates / f"sample_{row.index:05d}_{row.budget}.npz") for row in rows if row.budget == budget
        ]
        written = [(row, path) for row, path in written if path.exists()]
        started = time.process_time()
        found = [margin_of(path, certificates / "weights.npz") for _, path in written]
        seconds = (time.process_time() - started) / max(1, len(written))
        gains = [own - row.best_bound for own, (row, _) in zip(found, written, strict=True) if own is not None]
        with tempfile.TemporaryDirectory() as folder:
            wrong = [with_classes_exchanged(path, Path(folder)) for _, path in written]
            wrong = [margin_of(path, certificates / "weights.npz") for path in wrong]
        confirmed = [len(margins) - margins.count(None) for margins in (found, wrong)]
        ends = [f"{end:.1e}" for end in (min(gains, default=np.nan), max(gains, default=np.nan))]
        certified = sum(row.best_bound > 0 for row in rows if row.budget == budget)
        table.append([str(budget), str(certified), str(len(written)), *map(str, confirmed), *ends, f"{seconds:.2g}"])
    header = ["budget", "certified", "certificates", "confirmed", "with classes exchanged"]
    header += ["least margin less the run's", "greatest", "s to check"]
    print("\n".join(markdown_table(header, table)))


if __name__ == "__main__":
    run_main(main)
