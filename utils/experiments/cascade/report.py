"""The cascade's tables as people read them: shares of images, which stage settled them, and a figure over eps."""

from __future__ import annotations

import argparse
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...certify.cascade import CLEAN, STAGES
from ...network.checkpoint import Config, model_name
from ..plots import columns_of_panels, headline, images_text, norm_symbol, tidy
from ..tables import OWN, Case, markdown_table, norm_text
from ..wording import clip_text, noun_of, short_unit
from .rows import BROKEN, LETTERS, UNDECIDED, VERIFIED, WRONG, Group, letters_of

COLORS = ("tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:cyan")
ORDINARY = "ordinary"
STAGE_NAMES = {CLEAN: "wrong as it is", "runner-up": "PGD, runner-up", "pgd": "PGD, all classes"}


def recipe_of(config: Config) -> dict[str, Any] | None:
    """How a model was trained to be verified; None of an ordinary one."""
    return config.get("certified") or None


def architecture_of(config: Config) -> str:
    """The name of a model of this cell, with these sizes, trained without a recipe; its head may read other states."""
    return model_name({key: value for key, value in config.items() if key != "recipe"} | {"pooling": "last"})


def base(case: Case) -> str:
    """What models are compared with: the ordinary one of their architecture, one's own with itself."""
    return case.name if case.is_own else architecture_of(case.config)


def summarize(group: Group, case: Case) -> dict[str, Any]:
    """The shares of all images of a model at an eps, and what each stage tried, settled and took."""
    letters, first = letters_of(group), group[0]
    total = len(letters)
    wrong, broken, verified = (sum(letter in kind for letter in letters) for kind in (WRONG, BROKEN, VERIFIED))
    unbroken = total - wrong - broken
    record = {"model": first.model, "architecture": base(case), "recipe": recipe_text(case.config)}
    record |= {"norm": f"{first.norm:g}", "ball": first.ball, "eps": first.eps, "images": total}
    record |= {"clean": 1 - wrong / total, "pgd": unbroken / total, "verified": verified / total}
    record["verified_of_unbroken"] = verified / unbroken if unbroken else 1.0
    record["undecided"] = letters.count(UNDECIDED) / total
    record["processor_seconds"] = sum(row.cost(stage, "seconds") for row in group for stage in (CLEAN, *STAGES))
    for stage in (CLEAN, *STAGES):
        record[f"settled_by_{stage}"] = letters.count(LETTERS[stage]) / total
        record[f"tried_by_{stage}"] = sum(row.cost(stage, "tried") for row in group)
        record[f"{stage}_processor_seconds"] = sum(row.cost(stage, "seconds") for row in group)
    return record


def recipe_text(config: Config) -> str:
    recipe = recipe_of(config)
    if recipe is None:
        return "–" if config["architecture"] == OWN else ORDINARY
    ball = ", one ball" * (recipe.get("ball", "frame") == "sequence") + ", cut boxes" * bool(recipe.get("clip"))
    return f"{recipe['loss']}, {norm_text(float(recipe['p']))} {float(recipe['train_eps']):g}{ball}"


def accuracy_table(records: list[dict]) -> list[str]:
    """Lines of a table: a line for each model and eps."""
    header = ["model", "training", "eps", "images"]
    header += ["clean", "PGD", "verified", "verified / PGD", "undecided", "seconds"]
    cells = []
    for record in records:
        shares = [f"{100 * record[name]:.2f}" for name in ("clean", "pgd", "verified")]
        ratio = f"{record['verified_of_unbroken']:.3f}" if record["pgd"] > 0 else "–"
        row = [f"`{record['model']}`", record["recipe"], f"{record['eps']:g}", str(record["images"]), *shares, ratio]
        cells.append([*row, f"{100 * record['undecided']:.2f}", f"{record['processor_seconds']:.3g}"])
    return markdown_table(header, cells, text_columns=2)


def stage_table(records: list[dict]) -> list[str]:
    """Lines of a table: what each stage settled, for each model and eps."""
    used = [stage for stage in (CLEAN, *STAGES) if any(r[f"tried_by_{stage}"] for r in records)]
    cells = []
    for record in records:
        shares = [stage_cell(record, stage) for stage in used]
        cells.append([f"`{record['model']}`", f"{record['eps']:g}", *shares])
    return markdown_table(["model", "eps", *(STAGE_NAMES.get(stage, stage) for stage in used)], cells)


def stage_cell(record: dict, stage: str) -> str:
    """The share that a stage settled, in per cent, what it tried, and its seconds; a dash where nothing was left."""
    tried, seconds = record[f"tried_by_{stage}"], record[f"{stage}_processor_seconds"]
    return f"{100 * record[f'settled_by_{stage}']:.2f} ({tried}, {seconds:.2g} s)" if tried else "–"


def effort_lines(args: argparse.Namespace) -> list[str]:
    """What every stage was allowed, and what the letters in the rows mean."""
    names = STAGE_NAMES | {"": "undecided"}
    letters = ", ".join(f"`{letter}` {names.get(stage, stage)}" for stage, letter in LETTERS.items())
    return [
        f"Effort: a stage takes the most promising images of a batch of {args.batch_size} first, and gives up after",
        f"{args.patience} in a row that it cannot settle (alpha and bab after a tenth of that). These two may take",
        f"{args.time_limit:g} s an image each, and together {args.total_limit:g} s for a model at an eps.",
        f"rows.csv has a letter an image, in the order of their numbers: {letters}.",
    ]


def plot(summary: list[dict], args: argparse.Namespace) -> Figure:
    """Accuracies over eps, a panel for each architecture and threat, a colour for each of its models."""
    panels: dict[tuple, list[dict]] = {}
    for record in summary:
        panels.setdefault((record["architecture"], record["norm"], record["ball"]), []).append(record)
    columns = columns_of_panels(len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.0, 0.8 + 3.1 * columns), 1.2 + 2.8 * count), layout="constrained")
    every = figure.subplots(count, columns, squeeze=False, sharey=True)
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((name, norm, ball), records) in zip(every.flat, panels.items(), strict=False):
        plot_panel(axes, records)
        axes.set_title(name + ", one ball" * (ball == "sequence"), fontsize=9)
        axes.set_xlabel(rf"$\epsilon$ ({norm_symbol(norm)}, {short_unit(args)})", fontsize=9)
    for axes in every[:, 0]:
        axes.set_ylabel(f"share of {noun_of(args)} (%)", fontsize=9)
    styles = {"clean": ":", "not broken by PGD": "--", "verified": "-"}
    handles = [Line2D([], [], color="black", linestyle=style, label=name) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    shown = images_text([record["images"] for record in summary], noun_of(args))
    headline(figure, f"{shown}, all classes{f'; {clip_text(args)}' if args.clip else ''}")
    return figure


def plot_panel(axes: Axes, records: list[dict]) -> None:
    colors = iter(COLORS)
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        color = "black" if own[0]["recipe"] == ORDINARY else next(colors, "tab:gray")
        eps, clean = [0.0, *(record["eps"] for record in own)], 100 * own[0]["clean"]
        axes.plot(eps, [clean] * len(eps), ":", color=color, linewidth=1)
        for kind, style in (("pgd", "--"), ("verified", "o-")):
            label = {"label": own[0]["recipe"]} if kind == "verified" else {}
            axes.plot(eps, [clean, *(100 * r[kind] for r in own)], style, color=color, markersize=3, **label)
    axes.set_ylim(0, 103)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7)
    tidy(axes)
