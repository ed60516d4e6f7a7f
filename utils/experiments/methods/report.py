"""The table of methods as people read it: radii and costs by model and method, and certified shares over eps."""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...runs.bound_rows import statistics
from ..plots import columns_of_panels, headline, images_text, norm_symbol, stairs, tidy
from ..tables import markdown_table
from ..wording import noun_of, short_unit
from .rows import TOL, Group, MethodRow, cheaper_method, falls_short, shortfalls

COLORS = {"ibp": "tab:gray", "crown-ibp": "tab:brown", "crown": "tab:blue", "alpha": "tab:green"}
COLORS |= {"curve": "tab:purple", "bab": "black"}


def summarize(group: Group, method: str) -> dict:
    """Means over the images of a model and a norm by one method, and how often it is behind the cheaper one."""
    rows = group[method]
    radius, attack = (statistics([getattr(row, name) for row in rows]) for name in ("radius", "attack"))
    cheaper = cheaper_method(method, list(group))
    pairs = list(zip(rows, group[cheaper], strict=True)) if cheaper else []
    record = {"model": rows[0].model, "norm": f"{rows[0].norm:g}", "method": method, "images": len(rows)}
    record |= {"radius_mean": radius["mean"], "radius_std": radius["std"]}
    record |= {"attack_mean": attack["mean"], "attack_std": attack["std"]}
    record |= {"ratio_of_means": radius["mean"] / attack["mean"]}
    record |= {"mean_of_ratios": statistics([row.share for row in rows])["mean"]}
    for name in ("seconds", "processor_seconds", "attack_seconds"):
        record[name] = statistics([getattr(row, name) for row in rows])["mean"]
    record["cheaper"] = cheaper or ""
    record["below_cheaper"] = sum(falls_short(*pair) for pair in pairs) if cheaper else ""
    return record


def model_table(records: list[dict]) -> list[str]:
    """Lines of a table: a line for each model and method."""
    header = ["model", "method", "images", "radius", "PGD", "radius / PGD, of means", "mean of ratios"]
    header += ["s per image", "processor s", "below the cheaper method's"]
    cells = []
    for record in records:
        radius, attack = (f"{record[f'{n}_mean']:.3g} ± {record[f'{n}_std']:.2g}" for n in ("radius", "attack"))
        ratios = [f"{record[name]:.3f}" for name in ("ratio_of_means", "mean_of_ratios")]
        seconds = [f"{record[name]:.2g}" for name in ("seconds", "processor_seconds")]
        below = f"{record['below_cheaper']} of {record['images']}" if record["cheaper"] else "–"
        cells.append(
            [f"`{record['model']}`", record["method"], str(record["images"]), radius, attack, *ratios, *seconds, below]
        )
    return markdown_table(header, cells, text_columns=2)


def method_table(records: list[dict]) -> list[str]:
    """The trade-off of each method, all models counting alike."""
    names = {"ratio_of_means": ".3f", "mean_of_ratios": ".3f", "seconds": ".2g", "processor_seconds": ".2g"}
    cells = []
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        means = [f"{statistics([record[name] for record in own])['mean']:{form}}" for name, form in names.items()]
        cells.append([method, *means])
    return markdown_table(["method", "radius / PGD, of means", "mean of ratios", "s per image", "processor s"], cells)


def effort_line(args: argparse.Namespace) -> str:
    """What the search and each method were allowed."""
    efforts = {"alpha": f"{args.alpha_steps} steps", "curve": f"{args.curve_steps} steps"}
    efforts["bab"] = f"{args.time_limit:g} s an image"
    words = [f"{name} {effort}" for name, effort in efforts.items() if name in args.methods]
    return "; ".join([f"Effort: radii are searched to a relative tolerance of {TOL:g}", *words]) + "."


def order_lines(rows: list[MethodRow], args: argparse.Namespace) -> list[str]:
    """Whether every tuned method certifies what the cheaper one does; the images on which one does not."""
    found = shortfalls(rows, args.methods)
    if not found:
        return ["On no image is a radius below the cheaper method's by more than that tolerance."]
    head = f"**{len(found)} radii are below the cheaper method's by more than that tolerance, which must not be:**"
    return [head, "", *(f"- {words}" for words in found)]


def plot(groups: dict[tuple[str, float], Group], against: str, args: argparse.Namespace) -> Figure:
    """Certified share of the images over eps, with the attack's above: a panel for each model and norm."""
    norms = list(dict.fromkeys(norm for _, norm in groups))
    models = list(dict.fromkeys(model for model, _ in groups))
    columns = columns_of_panels(len(models))
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(max(5.0, 0.8 + 2.7 * columns), 0.9 + 2.3 * lines * len(norms)), layout="constrained")
    every = figure.subplots(lines * len(norms), columns, squeeze=False, sharey=True)
    for axes in every.flat:
        axes.set_visible(False)
    for (model, norm), group in groups.items():
        line, column = divmod(models.index(model), columns)
        axes = every[line + lines * norms.index(norm), column]
        axes.set_visible(True)
        plot_panel(axes, group)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel(rf"$\epsilon$ ({norm_symbol(norm)}, {short_unit(args)})", fontsize=9)
    for axes in every[:, 0]:
        axes.set_ylabel(f"share of {noun_of(args)} (%)", fontsize=9)
    handles, names = every[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns + 1, 3), frameon=False, fontsize=9)
    shown = images_text([len(rows) for group in groups.values() for rows in group.values()], noun_of(args))
    headline(
        figure, f"{shown} a model, against {against};", "every slice in a ball of its own; planes, tuned by alpha on"
    )
    return figure


def plot_panel(axes: Axes, group: Group) -> None:
    """Shares of one model: what lies between the best certificate and the attack is undecided."""
    radii = {method: np.array([row.radius for row in rows]) for method, rows in group.items()}
    attack = np.array([row.attack for row in next(iter(group.values()))])
    every = np.concatenate([attack, *radii.values()])
    end = every[np.isfinite(every)].max()
    eps = np.unique(np.concatenate([[0.0], every.clip(max=2 * end)]))
    low, high = (100 * (values > eps[:, None]).mean(axis=1) for values in (list(radii.values())[-1], attack))
    axes.fill_between(eps, low, high, step="post", color="tab:gray", alpha=0.15, linewidth=0, label="undecided")
    # An endless radius ends beyond the axis. Cheaper methods are thinner and on top, so that equal curves are all seen.
    stairs(axes, attack.clip(max=2 * end), len(attack), color="tab:red", linestyle="--", label="not broken by PGD")
    for number, (method, values) in enumerate(radii.items()):
        style = {"color": COLORS.get(method, "tab:orange"), "linewidth": 1.2 + 0.6 * number, "zorder": 3 - 0.1 * number}
        stairs(axes, values.clip(max=2 * end), len(values), label=f"certified by {method}", **style)
    axes.set_xlim(0, 1.02 * end)
    axes.set_ylim(0, 103)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    tidy(axes)
