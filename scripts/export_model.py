"""Export a trained classifier to ONNX, with VNN-LIB properties for MNIST images, so that other verifiers can run it.

    python scripts/export_model.py --model models/mnist_classifier/lstm_4_32 --N 10 --eps 0.005 0.01 --out-dir vnncomp

Writes onnx/NAME.onnx, vnnlib/NAME_IMAGE_EPS.vnnlib and instances.csv, which scripts/verify.py reads. A property is
about the box |x' - x| <= eps around all pixels, in [0, 1], cut to that range: is some image in it given another class?
The file is checked with onnxruntime: its outputs must be the classifier's, up to the rounding of float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import (
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    positive_float,
    positive_int,
    run_main,
)


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="PATH", help="a checkpoint, or its folder")
    parser.add_argument("--out-dir", type=Path, required=True, metavar="FOLDER", help="where the files are written")
    parser.add_argument("--N", type=positive_int, default=10, help="test images drawn; the misclassified are left out")
    parser.add_argument(
        "--eps",
        type=positive_float,
        nargs="+",
        default=[0.01],
        metavar="EPS",
        help="half sides of the box, in pixel values",
    )
    parser.add_argument("--no-clip", action="store_true", help="do not cut the box to pixel values from 0 to 1")
    parser.add_argument("--timeout", type=positive_float, default=60.0, help="seconds per instance, for instances.csv")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from data.mnist import load_mnist
from utils.certify.vnnlib import write_robustness
from utils.experiments.samples import draw_samples
from utils.network.checkpoint import load_checkpoint
from utils.network.onnx_export import export_onnx
from utils.network.onnx_graph import read_onnx
from utils.runs.results import replacing

SAME = 1e-4  # of the file's outputs and the classifier's, relative to the largest


def find_checkpoint(path: Path) -> Path:
    """The path itself, or the checkpoint in the folder that it names."""
    if not path.is_dir():
        return path
    found = [path / name for name in ("rnn", "lstm", "gru") if (path / name).is_file()]
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} checkpoints named rnn, lstm or gru: name the file itself")
    return found[0]


def main() -> None:
    args = get_args()
    apply_common_arguments(args)
    checkpoint = find_checkpoint(args.model)
    model, config = load_checkpoint(checkpoint)
    if config["architecture"] == "mlp":
        raise ValueError(f"{checkpoint} is a multi-layer perceptron: torch.onnx.export writes it")
    num_frames, name = config["num_frames"], checkpoint.resolve().parent.name
    drawing = {"N": args.N, "seed": args.seed, "time_step": num_frames, "dtype": "float64", "untargeted": True}
    samples = draw_samples(load_mnist(args.data_dir), model, argparse.Namespace(**drawing))
    x = samples.frames(num_frames).double()
    if args.dry_run:
        print(f"{name}: {len(x)} images and {len(args.eps)} values of eps would be written to {args.out_dir}")
        return

    file = export_onnx(model, num_frames, args.out_dir / "onnx" / f"{name}.onnx")
    network = read_onnx(file)  # which compares it with onnxruntime at random inputs
    outputs = network.runtime_outputs(x.flatten(1))
    if outputs is None:
        print("onnxruntime is not installed: the file is not checked", file=sys.stderr)
    else:
        with torch.no_grad():
            expected = model.double()(x)
        difference = (outputs - expected).abs().amax() / (1.0 + expected.abs().amax())
        if not difference <= SAME:
            raise ValueError(f"{file}: onnxruntime's outputs differ from the classifier's by {difference:.2g}")
        print(f"{file}: onnxruntime's outputs are the classifier's, up to {difference:.1g}")

    rows = []
    for index, label, values in zip(samples.index.tolist(), samples.labels.tolist(), x.flatten(1), strict=True):
        for eps in args.eps:
            low, high = values - eps, values + eps
            if not args.no_clip:
                low, high = low.clamp(min=0.0), high.clamp(max=1.0)
            path = Path("vnnlib") / f"{name}_{index}_{eps:g}.vnnlib"
            write_robustness(args.out_dir / path, low, high, label, config["num_classes"])
            rows.append(f"onnx/{file.name},{path.as_posix()},{args.timeout:g}\n")
    with replacing(args.out_dir / "instances.csv") as path:
        path.write_text("".join(rows))
    print(f"{len(rows)} instances in {args.out_dir / 'instances.csv'}")


if __name__ == "__main__":
    run_main(main)
