"""What a word run shows: console rows, the summary table, a self-contained HTML page and figures."""

from __future__ import annotations

import html
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..runs.results import Record, read_record, replacing
from .word_results import SentenceRow, WordRow, read_results
from .word_summary import BINS, by_text, counted

HTML_NAME, SENTENCES_FIGURE, SUMMARY_FIGURE = "words.html", "words.png", "summary.png"
REPORTS = (HTML_NAME, SENTENCES_FIGURE, SUMMARY_FIGURE)
UNDERLINED = 0.25  # share of a text's words that count as its most sensitive ones
WIDTH = 110  # columns of the console
DRAWN = 12  # texts in the figure
DPI = 150
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#fbd0be", "#f08a72"])


def most_sensitive(rows: list[WordRow]) -> set[int]:
    """Positions of a text's words of least radius: a quarter of the words, at least one."""
    number = max(1, round(UNDERLINED * len(rows)))
    return {row.position for row in sorted(rows, key=lambda row: row.radius)[:number]}


def shade(row: WordRow, rows: list[WordRow]) -> float:
    """1 for the most sensitive word of a text, and less the larger a radius is: (least radius / radius) squared."""
    return (min(other.radius for other in rows) / row.radius) ** 2 if row.radius > 0 else 1.0


# --- console --------------------------------------------------------------------------------------------------------


def print_sentences(
    words: list[WordRow], sentences: list[SentenceRow], class_names: list[str], show: int, given: bool = False
) -> None:
    """The first texts with their radii, and what the marks say. ``given`` texts have predictions, not labels."""
    print("\nradius: how far a word's vector may move; attack: the least move found that changes the class;")
    print("---- below the most sensitive quarter of a text's words; word*: not in the vocabulary")
    for rows, sentence in list(zip(by_text(words), sentences, strict=True))[:show]:
        kind = "predicted " * given + class_names[sentence.label]
        print(f"\n#{sentence.index} {kind}: all words together {sentence.radius:.4g}")
        for line in sentence_lines(rows):
            print(line)
    if len(sentences) > show:
        print(f"\n... and {len(sentences) - show} more in the result files")


def sentence_lines(rows: list[WordRow]) -> list[str]:
    """Lines of words, underlines, radii, and attacks if there are any, not wider than the console."""
    attacked = any(not math.isnan(row.attack) for row in rows)
    titles = ["", "", "radius", *["attack"] * attacked]
    underlined = most_sensitive(rows)
    columns = []
    for row in rows:
        word = row.word + "*" * (not row.known)
        cells = [word, "-" * len(word) * (row.position in underlined), f"{row.radius:.3f}"]
        cells += [f"{row.attack:.3f}"] * attacked
        width = max(map(len, cells))
        columns.append([cell.ljust(width) for cell in cells])
    lines, used = [], WIDTH + 1
    for column in columns:
        if used + len(column[0]) + 2 > WIDTH:
            lines += [[title.ljust(6)] for title in titles]
            used = 6
        for line, cell in zip(lines[-len(titles) :], column, strict=True):
            line.append(cell)
        used += len(column[0]) + 2
    return ["  ".join(line).rstrip() for line in lines]


def print_summary(summary: Record) -> None:
    """The statistics over all texts as tables."""
    amounts = f"{counted(summary['words'], 'word')} of {counted(summary['texts'], 'text')}"
    print(f"\n{amounts}, {summary['unknown_words']} unknown: ", end="")
    print(f"mean radius {summary['radius']['mean']:.4g}, whole text {summary['sentence_radius']['mean']:.4g}; ", end="")
    print(f"{summary['seconds_per_word']:.3g} s per word")
    if summary["attack"]["mean"] is not None:
        ratio = summary["radius_over_attack"]["mean"]
        print(f"smallest change found by attacks: mean {summary['attack']['mean']:.4g}; radius / attack {ratio:.3f}")
    print(f"substitutions ruled out: {summary['covered_pairs']} vocabulary words inside the words' balls, ", end="")
    print(f"{summary['words_with_covered']} words have any")
    for line in relaxation_lines(summary["relaxations"]):
        print(line)
    for name in ("certified", "attacked"):
        if name in summary:
            print(
                f"\n{name + ' by':<15}{'words':>7}{'radius / mean of text':>24}{'most sensitive':>17}{'by chance':>12}"
            )
            for row in summary[name]["kinds"]:
                share = f"{100 * row['most_sensitive_share']:.1f} %", f"{100 * row['share_by_chance']:.1f} %"
                print(
                    f"{row['kind']:<15}{row['words']:>7}{_pm(row['relative_radius']):>24}{share[0]:>17}{share[1]:>12}"
                )
            places = "   ".join(_pm(place) for place in summary[name]["places"])
            print(f"from the first to the last fifth of a text: {places}")
            correlations = [summary[name][key] for key in ("position_correlation", "position_correlation_content")]
            print(f"rank correlation of position and radius: {_pm(correlations[0])}", end="")
            print(f", among content words {_pm(correlations[1])}")


def relaxation_lines(table: list[Record]) -> list[str]:
    """The comparison of relaxations."""
    if not table:
        return []
    lines = [
        f"{'relaxation':<12}{'mean radius':>12}{'median':>10}{'covered pairs':>15}"
        f"{'words with any':>16}{'s / word':>10}"
    ]
    for row in table:
        numbers = f"{row['mean_radius']:>12.4f}{row['median_radius']:>10.4f}{row['covered_pairs']:>15}"
        lines.append(f"{row['relaxation']:<12}{numbers}{row['words_with_covered']:>16}{row['seconds_per_word']:>10.3f}")
    return lines


def _pm(values: Record) -> str:
    if values["mean"] is None:
        return "-"
    return f"{values['mean']:.3f}" + (f" +- {values['error']:.3f}" if values["error"] is not None else "")


# --- files ----------------------------------------------------------------------------------------------------------


def write_reports(folder: Path) -> list[str]:
    """Write the HTML page and the figures from a folder's result files; returns their names."""
    words, sentences = read_results(folder)
    record = read_record(folder)
    with replacing(folder / HTML_NAME) as path:
        path.write_text(html_page(words, sentences, record), encoding="utf-8")
    drawn = {SENTENCES_FIGURE: plot_sentences(words, sentences, record)}
    if len(sentences) > 1:
        drawn[SUMMARY_FIGURE] = plot_summary(record)
    for name, figure in drawn.items():
        with replacing(folder / name) as path:
            figure.savefig(path, dpi=DPI)
    return [HTML_NAME, *drawn]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em; margin: 2em auto;
  padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.4em; margin-bottom: .2em; }
p { margin: .4em 0; color: #555; }
section { border-top: 1px solid #ddd; padding: .9em 0; }
.head { font-size: .85em; color: #666; }
.head b { color: #222; }
.words { display: flex; flex-wrap: wrap; gap: .35em; margin-top: .3em; }
.word { border-radius: .35em; padding: .1em .45em; text-align: center; border: 1px solid #e3e3e3; color: #222; }
.word small { display: block; font-size: .75em; color: #222; font-style: normal; }
.unknown { font-style: italic; border: 1.5px dashed #444; }
.sensitive > span { text-decoration: underline; text-underline-offset: .18em; }
""".strip()


def _legend() -> str:
    color = [", ".join(str(round(255 * part)) for part in SHADES(share)[:3]) for share in (1.0, 0.5, 0.0)]
    samples = [
        ("", color[0], "least radius of its text"),
        ("", color[1], "1.4 times that"),
        ("", color[2], "many times that"),
        (" sensitive", color[2], "in the most sensitive quarter"),
        (" unknown", color[2], "not in the vocabulary: such words share one vector"),
    ]
    return "".join(
        f'<span class="word{kind}" style="background: rgb({c})"><span>{t}</span></span>' for kind, c, t in samples
    )


LEGEND = _legend()


def html_page(words: list[WordRow], sentences: list[SentenceRow], record: Record) -> str:
    """A page without any other file or address, every word shaded by its radius."""
    model, p = record["model"]["name"], f"{float(record['arguments']['p']):g}"
    title = html.escape(f"{model}: {record['title']}")
    p_name = "&infin;" if p == "inf" else p
    before, _, _ = title.rpartition("l_")
    body = [
        f"<h1>{before}&#8467;<sub>{p_name}</sub></h1>",
        "<p>Below each word is its certified radius: the class stays the same as long as only this word's vector "
        f"moves, by at most that much in the &#8467;<sub>{p_name}</sub> norm. Its unit is that of the word vectors, so "
        "radii compare within one model. Point at a word for more.</p>",
        f'<p class="words">{LEGEND}</p>',
    ]
    for rows, sentence in zip(by_text(words), sentences, strict=True):
        name = html.escape(record["class_names"][sentence.label])
        head = (
            f"#{sentence.index} &middot; class <b>{name}</b> &middot; radius if all words move: {sentence.radius:.4g}"
        )
        spans = "".join(_html_word(row, rows) for row in rows)
        body.append(f'<section><div class="head">{head}</div><div class="words">{spans}</div></section>')
    encoding = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{encoding}<title>{title}</title><style>\n{STYLE}\n</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_word(row: WordRow, rows: list[WordRow]) -> str:
    kinds = "word" + " unknown" * (not row.known) + " sensitive" * (row.position in most_sensitive(rows))
    color = ", ".join(str(round(255 * part)) for part in SHADES(shade(row, rows))[:3])
    about = f"certified {row.radius:.4g}"
    about += "" if math.isnan(row.attack) else f", broken by an attack at {row.attack:.4g}"
    about += f"; nearest word {row.nearest} at {row.distance:.4g}"
    about += f"; {row.covered} words inside the ball: {row.examples}" if row.covered else "; no other word in the ball"
    word = html.escape(row.word)
    return (
        f'<span class="{kinds}" style="background: rgb({color})" title="{html.escape(about)}">'
        f"<span>{word}</span><small>{row.radius:.3f}</small></span>"
    )


def figure_title(record: Record) -> str:
    """Model and threat model, with the norm as matplotlib sets it."""
    words, _, norm = record["title"].rpartition("l_")
    return rf"{record['model']['name']}: {words}$\ell_{{{norm}}}$".replace("inf", r"\infty")


def plot_sentences(words: list[WordRow], sentences: list[SentenceRow], record: Record) -> Figure:
    """Some texts, every word shaded by its radius, with the radius below it."""
    chosen = list(zip(by_text(words), sentences, strict=True))[:DRAWN]
    lines = []  # (label, rows on this line)
    for rows, sentence in chosen:
        label, line, used = record["class_names"][sentence.label], [], 0
        for row in rows:
            if used + _width(row) > 88 and line:
                lines.append((label, line, rows))
                label, line, used = "", [], 0
            line.append(row)
            used += _width(row)
        lines.append((label, line, rows))
    widest = max(60.0, *(sum(map(_width, line)) for _, line, _ in lines))
    figure = Figure(figsize=(0.11 * (widest + 10), 0.9 + 0.46 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-10, widest), ylim=(len(lines) - 0.4, -0.6))
    axes.axis("off")
    shown = f"the first {len(chosen)} drawn; " * (len(chosen) < len(sentences))
    legend = "below each word its radius, darker the nearer to the least of its text; dashed: not in the vocabulary"
    axes.set_title(f"{figure_title(record)}\n{shown}{legend}", fontsize=9)
    for y, (label, line, rows) in enumerate(lines):
        axes.text(-0.8, y, label, ha="right", va="center", fontsize=8.5, fontweight="bold", parse_math=False)
        x = 0.0
        for row in line:
            width = _width(row)
            axes.add_patch(
                _box(x, y - 0.4, width - 0.5, 0.78, SHADES(shade(row, rows)), "--" if not row.known else "-")
            )
            style = "italic" if not row.known else "normal"
            middle = x + (width - 0.5) / 2
            axes.text(middle, y - 0.12, row.word, ha="center", va="center", fontsize=9, style=style, parse_math=False)
            axes.text(middle, y + 0.2, f"{row.radius:.3f}", ha="center", va="center", fontsize=6.5, color="#333333")
            x += width
    return figure


def _width(row: WordRow) -> float:
    return 1.7 + 0.95 * max(len(row.word), 3)


def _box(x: float, y: float, width: float, height: float, color, style: str):
    return Rectangle((x, y), width, height, facecolor=color, edgecolor="#999999", linewidth=0.6, linestyle=style)


def plot_summary(record: Record) -> Figure:
    """Relative radii by kind of word and by position, certified and attacked."""
    summary = record["summary"]
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    amounts = f"{counted(summary['words'], 'word')} of {counted(summary['texts'], 'text')}"
    figure.suptitle(f"{figure_title(record)} ({amounts}; bars: 2 standard errors)", fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True)
    series = [
        (name, summary[name], color)
        for name, color in (("certified", "tab:blue"), ("attacked", "tab:orange"))
        if name in summary
    ]
    kinds = [row["kind"] for row in series[0][1]["kinds"] if row["words"]]
    for offset, (name, found, color) in enumerate(series):
        by_kind = {row["kind"]: row["relative_radius"] for row in found["kinds"]}
        place = np.arange(len(kinds)) + (offset - (len(series) - 1) / 2) * 0.16
        _dots(left, place, [by_kind[kind] for kind in kinds], "o", name, color)
        _dots(right, np.arange(BINS) + (offset - (len(series) - 1) / 2) * 0.08, found["places"], "o-", name, color)
    counts = {row["kind"]: row["words"] for row in series[0][1]["kinds"]}
    left.set_xticks(range(len(kinds)), [f"{kind}s\n({counts[kind]})" for kind in kinds])
    left.set_xlim(-0.5, len(kinds) - 0.5)
    right.set_xticks(range(BINS), ["first", *[""] * (BINS - 2), "last"])
    right.set_xlabel("fifth of the text")
    left.set_ylabel("radius / mean radius of the text")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _dots(axes: Axes, x: np.ndarray, values: list[Record], style: str, label: str, color: str) -> None:
    known = [n for n, value in enumerate(values) if value["mean"] is not None]
    means = [values[n]["mean"] for n in known]
    errors = [2 * (values[n]["error"] or 0.0) for n in known]
    axes.errorbar(np.asarray(x)[known], means, errors, fmt=style, label=label, color=color, capsize=3, markersize=5)
