"""Time of one bound and of one radius search per sample, where it goes, and how it grows with T and hidden size.

Times are medians over repeats without a profiler: by the clock, and the processor's own, which other processes on the
machine disturb less. The breakdown is that of the fastest of several runs under torch.profiler, which slows Python down
(the factor is in the table), so it gives shares, not times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages about itself

from utils.runs.cli import (
    ArgumentParser,
    answer_early,
    git_commit,
    norm_value,
    positive_int,
    resolve_device,
    run_main,
    versions,
)

QUICK = {"batch_sizes": [4], "repeats": 2, "frames_sweep": [2, 4], "hidden_sweep": [8, 16], "sweep_batch": 4}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--architecture", choices=("rnn", "lstm", "gru"), default="rnn", help="of a model with random weights"
    )
    parser.add_argument("--checkpoint", type=Path, help="a trained model in place of a random one")
    parser.add_argument("--time-step", type=positive_int, default=7, help="frames T of the random model")
    parser.add_argument("--hidden-size", type=positive_int, default=64, help="of the random model")
    parser.add_argument(
        "--input-size", type=positive_int, help="values per frame (default: 784 / T, a slice of an image)"
    )
    parser.add_argument("--activation", choices=("tanh", "relu"), default="tanh", help="of a vanilla RNN")
    parser.add_argument("--p", type=norm_value, default=2.0, help="norm of the balls: 1, 2 or inf")
    parser.add_argument("--method", choices=("crown", "ibp", "crown-ibp"), default="crown", help="bound")
    parser.add_argument(
        "--batch-sizes", type=positive_int, nargs="+", default=[1, 20, 100], help="samples bounded at once"
    )
    parser.add_argument("--frames-sweep", type=positive_int, nargs="+", default=[2, 4, 7, 14], help="values of T")
    parser.add_argument("--hidden-sweep", type=positive_int, nargs="+", default=[16, 32, 64, 128], help="hidden sizes")
    parser.add_argument("--sweep-batch", type=positive_int, default=20, help="batch size of the sweeps")
    parser.add_argument("--repeats", type=positive_int, default=5, help="runs of which the median is taken")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:K")
    parser.add_argument("--cuda", action="store_true", help="short for --device cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, in place of those given")
    parser.add_argument("--results-dir", type=Path, default=Path(__file__).parent / "results", help="where files go")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from utils.bounds.passes import BoundPass
from utils.certify import margin_problem, search_radius
from utils.graph.nonlinear import NonLinear
from utils.network.checkpoint import build_model, load_checkpoint, model_name
from utils.network.models import SequenceClassifier
from utils.perturbation.sets import Perturbation

PIXELS = 784
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"}
SHARES = ("slope set-up", "intervals", "concretization", "matrix products", "element-wise", "python")

Row = dict[str, object]


# --- what is timed --------------------------------------------------------------------------------------------------


def random_model(args: argparse.Namespace, num_frames: int, hidden_size: int) -> tuple[SequenceClassifier, dict]:
    config = {
        "architecture": args.architecture,
        "input_size": args.input_size or max(1, PIXELS // num_frames),
        "num_frames": num_frames,
        "hidden_size": hidden_size,
        "num_layers": 1,
        "num_classes": 10,
        "bidirectional": False,
        "bias": True,
        "activation": args.activation if args.architecture == "rnn" else None,
        "pooling": "last",
        "input_mean": 0.0,
        "input_std": 1.0,
    }
    torch.manual_seed(args.seed)
    return build_model(config).eval(), config


class Case:
    """One model, batch size and precision: the two things that are timed, ready to be called."""

    def __init__(self, args, model: SequenceClassifier, config: dict, batch: int, dtype: torch.dtype):
        self.device, self.dtype, self.batch, self.config = args.resolved_device, dtype, batch, config
        generator = torch.Generator().manual_seed(args.seed)
        x = torch.rand(batch, config["num_frames"], config["input_size"], generator=generator).to(self.device)
        model = model.to(self.device)
        with torch.no_grad():
            logits = model(x)
        labels, targets = logits.topk(2, dim=1).indices.T
        self.problem = margin_problem(model, x, labels, norm=args.p, targets=targets, method=args.method)
        self.result = self.search()
        self.eps = self.result.radius.clamp(min=1e-6)
        self.problem.graph(dtype)

    def search(self):
        """The whole radius search at tol 1e-3: in this precision, with the verdict in float64."""
        with torch.no_grad():
            return search_radius(self.problem, search_dtype=self.dtype, batch_size=self.batch)

    def bound(self) -> Tensor:
        """One bound of one targeted margin per sample, at the certified radius."""
        with torch.no_grad():
            return self.problem.margins(self.eps, self.dtype)

    def median_seconds(self, function: Callable, repeats: int) -> tuple[float, float]:
        """By the clock and of the processor."""
        times = []
        for _ in range(repeats + 1):
            self.synchronize()
            clock, processor = time.perf_counter(), time.process_time()
            function()
            self.synchronize()
            times.append((time.perf_counter() - clock, time.process_time() - processor))
        return tuple(statistics.median(kind) for kind in zip(*times[1:], strict=True))  # the first run warms up

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(args, model: SequenceClassifier, config: dict, batch: int, dtype_name: str, sweep: str) -> Row:
    case = Case(args, model, config, batch, DTYPES[dtype_name])
    bound, bound_cpu = case.median_seconds(case.bound, args.repeats)
    search, search_cpu = case.median_seconds(case.search, max(1, args.repeats // 2))
    shares, seconds = breakdown(case, args.repeats)
    return {
        "sweep": sweep,
        "model": model_name(config),
        "frames": config["num_frames"],
        "hidden_size": config["hidden_size"],
        "input_size": config["input_size"],
        "batch": batch,
        "dtype": dtype_name,
        "bound_ms_per_sample": 1e3 * bound / batch,
        "search_ms_per_sample": 1e3 * search / batch,
        "bound_cpu_ms_per_sample": 1e3 * bound_cpu / batch,
        "search_cpu_ms_per_sample": 1e3 * search_cpu / batch,
        "evaluations": case.result.evaluations.double().mean().item(),
        "peak_mib": peak_memory(case) / 2**20,
        "profiler_slowdown": seconds / bound,
    } | shares


# --- where the time goes --------------------------------------------------------------------------------------------


def breakdown(case: Case, repeats: int) -> tuple[dict[str, float], float]:
    """Shares of the CPU side of one bound, and its seconds, in the fastest of a few runs under the profiler."""
    runs = []
    with labelled_engine():
        for _ in range(repeats + 1):
            with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("bound"):
                case.bound()
            totals = dict.fromkeys(SHARES, 0.0)
            for event in profiler.events():
                totals[category(event)] += event.self_cpu_time_total
            runs.append((1e-6 * sum(totals.values()), totals))
    seconds, totals = min(runs, key=lambda run: run[0])
    return {name: 1e-6 * total / seconds for name, total in totals.items()}, seconds


def category(event) -> str:
    """The innermost label around an operation; in the propagation, the kind of operation; Python between them."""
    if event.name in ("bound", *SHARES):
        return "python"
    parent = event
    while parent is not None and parent.name not in SHARES:
        parent = parent.cpu_parent
    if parent is not None:
        return parent.name
    while event is not None:  # a product's own work may lie in operations below it
        if event.name in PRODUCTS:
            return "matrix products"
        event = event.cpu_parent
    return "element-wise"


@contextmanager
def labelled_engine() -> Iterator[None]:
    """Within it, the engine's functions put their labels around what they do."""
    patched = [
        (BoundPass, "interval", "intervals"),
        (Perturbation, "frame_deviation", "concretization"),
        (Perturbation, "total_deviation", "concretization"),
    ]
    patched += [(kind, "relax", "slope set-up") for kind in _descendants(NonLinear) if "relax" in vars(kind)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    try:
        for owner, name, label in patched:
            setattr(owner, name, _labelled(getattr(owner, name), label))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _descendants(kind: type) -> list[type]:
    return [kind] + [below for child in kind.__subclasses__() for below in _descendants(child)]


def _labelled(function: Callable, label: str) -> Callable:
    def wrapper(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return wrapper


def peak_memory(case: Case) -> float:
    """Most bytes of tensors alive at once during one bound, beyond those alive before it."""
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        case.bound()
        return torch.cuda.max_memory_allocated(case.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.bound()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda change: change.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return float(peak)


# --- results --------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[Row]:
    rows = []
    if args.checkpoint is not None:
        model, config = load_checkpoint(args.checkpoint)
        args.architecture = config["architecture"]
    else:
        model, config = random_model(args, args.time_step, args.hidden_size)
    plan = [(model, config, batch, "batch") for batch in args.batch_sizes]
    for num_frames in args.frames_sweep:
        plan.append((*random_model(args, num_frames, args.hidden_size), args.sweep_batch, "frames"))
    for hidden_size in args.hidden_sweep:
        plan.append((*random_model(args, args.time_step, hidden_size), args.sweep_batch, "hidden"))
    print(header())
    for model, config, batch, sweep in plan:
        for dtype in DTYPES:
            rows.append(measure(args, model, config, batch, dtype, sweep))
            print(table_line(rows[-1]), flush=True)
    return rows


def header() -> str:
    titles = ("sweep", "model", "batch", "dtype", "bound ms", "cpu", "search ms", "cpu", "bounds", "MiB", "prof.")
    widths = (7, 16, 6, 8, 9, 8, 10, 8, 7, 8, 6)
    line = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    return line + "".join(f"{name:>17}" for name in SHARES) + "\n(times per sample, shares of one bound)"


def table_line(row: Row) -> str:
    line = f"{row['sweep']:>7}{row['model']:>16}{row['batch']:>6}{row['dtype']:>8}{row['bound_ms_per_sample']:>9.3f}"
    line += f"{row['bound_cpu_ms_per_sample']:>8.3f}"
    line += f"{row['search_ms_per_sample']:>10.2f}{row['search_cpu_ms_per_sample']:>8.2f}"
    line += f"{row['evaluations']:>7.1f}{row['peak_mib']:>8.1f}"
    return line + f"{row['profiler_slowdown']:>6.2f}" + "".join(f"{100 * row[name]:>16.0f}%" for name in SHARES)


def save(args: argparse.Namespace, rows: list[Row]) -> list[Path]:
    args.results_dir.mkdir(parents=True, exist_ok=True)
    stem = args.results_dir / f"bounds_{rows[0]['model']}_{args.resolved_device.type}"
    paths = [stem.with_name(stem.name + suffix) for suffix in (".csv", ".json", ".png")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings.pop("results_dir")
    settings["resolved_device"] = str(args.resolved_device)
    settings["checkpoint"] = args.checkpoint.parent.name if args.checkpoint else None
    record = {"settings": settings, "date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "versions": versions()}
    if args.resolved_device.type == "cuda":
        record["device"] = torch.cuda.get_device_name(args.resolved_device)
    paths[1].write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    words = f"{args.method}, l_{args.p:g}, all frames move; batches of {args.sweep_batch} on the left and in the middle"
    plot(rows, args.resolved_device.type == "cpu", words).savefig(paths[2], dpi=150)
    return paths


def plot(rows: list[Row], on_cpu: bool, words: str) -> Figure:
    """Cost over T and over hidden size, and the breakdown at each batch size; ``words`` on the method for the title."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = ((axes[0], "frames", "frames", "frames T"), (axes[1], "hidden", "hidden_size", "hidden size"))
    for panel, sweep, column, title in panels:
        for dtype in DTYPES:
            points = [row for row in rows if row["sweep"] == sweep and row["dtype"] == dtype]
            for quantity, style in (("bound", "o-"), ("search", "s--")):
                times = [
                    row[f"{quantity}_cpu_ms_per_sample" if on_cpu else f"{quantity}_ms_per_sample"] for row in points
                ]
                panel.plot([row[column] for row in points], times, style, label=f"{quantity}, {dtype}")
        panel.set(
            xscale="log", yscale="log", xlabel=title, ylabel="processor ms per sample" if on_cpu else "ms per sample"
        )
        values = sorted({row[column] for row in rows if row["sweep"] == sweep})
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.legend(fontsize=8)
    batches = [row for row in rows if row["sweep"] == "batch"]
    names = [f"{row['batch']}\n{row['dtype']}" for row in batches]
    base = [0.0] * len(batches)
    for share in SHARES:
        values = [100 * row[share] for row in batches]
        axes[2].bar(names, values, bottom=base, label=share)
        base = [low + value for low, value in zip(base, values, strict=True)]
    axes[2].set(xlabel="batch size and precision", ylabel="share of one bound (%)")
    axes[2].tick_params(axis="x", labelsize=7)
    axes[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"{rows[0]['model']}: cost of a bound and of a search of the radius; {words}", fontsize=10)
    return figure


def main() -> None:
    args = get_args()
    args.resolved_device = resolve_device(args)
    torch.set_num_threads(args.threads)
    rows = run(args)
    print("written:", *(path.name for path in save(args, rows)), "in", args.results_dir)


if __name__ == "__main__":
    run_main(main)
