"""What a run shows of its sentences: lines on the console, and a page in which each has its worst replacement."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ...runs.results import CSV_NAME, Record, read_record, replacing
from ...runs.rows import read_rows
from .rows import CERTIFIED, FALSIFIED, UNKNOWN, WRONG, SentenceRow, Shown, by_sentence, read_sentences
from .summary import summary_lines

HTML_NAME = "sentences.html"
SAYS = {
    CERTIFIED: "ruled out",
    FALSIFIED: "changes the class",
    UNKNOWN: "open: the worst that was found keeps the class",
    WRONG: "misclassified as it is",
}


def replacements(row: SentenceRow) -> dict[int, str]:
    """The words of the worst replacement found, by position."""
    pairs = (part.partition(":") for part in row.replaced.split(" ") if part)
    return {int(position): word for position, _, word in pairs}


def print_sentences(
    rows: Sequence[SentenceRow], sentences: Sequence[Shown], class_names: Sequence[str], show: int
) -> None:
    """The first sentences, and at each budget the verdict with the worst replacement found."""
    for group, shown in list(zip(by_sentence(rows), sentences, strict=True))[:show]:
        first = group[0]
        print(f"\n#{first.index} {class_names[first.label]}: {' '.join(shown.words)}")
        for row in group[:1] if first.verdict == WRONG else group:
            print(f"  {row.budget!s:>4} {row.verdict:<13} {_margins(row)}  {_changes(row, shown)}".rstrip())
    if len(sentences) > show:
        print(f"\n... and {len(sentences) - show} more in the result files")


def _margins(row: SentenceRow) -> str:
    bound = row.best_bound
    lowest = f", bound {bound:.4g}" if bound > float("-inf") else ""
    worst = f", worst found {row.attack:.4g}" if row.attack == row.attack else ""
    return f"margin {row.margin:.4g}{worst}{lowest}"


def _changes(row: SentenceRow, shown: Shown) -> str:
    return ", ".join(f"{shown.words[place]} -> {word}" for place, word in replacements(row).items())


STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em; margin: 2em auto;
  padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.4em; margin-bottom: .2em; }
p { margin: .4em 0; color: #555; }
pre { font-size: .85em; overflow-x: auto; background: #f6f6f6; padding: .6em; }
section { border-top: 1px solid #ddd; padding: .8em 0; }
.head { font-size: .85em; color: #666; }
.head b { color: #222; }
.free { border-bottom: 2px dotted #2a6fb0; cursor: help; }
.unknown { font-style: italic; color: #777; }
table { border-collapse: collapse; font-size: .9em; margin-top: .3em; }
td { padding: .1em .8em .1em 0; vertical-align: top; }
.certified { color: #1a7f37; } .falsified { color: #b3261e; } .open { color: #9a6700; }
mark { background: #fbd0be; padding: 0 .15em; } .certified mark { background: #e3f1e6; }
""".strip()


def write_page(folder: Path) -> None:
    """Write the page from a folder's result files."""
    rows, _ = read_rows(folder / CSV_NAME, SentenceRow)
    page = html_page(rows, read_sentences(folder), read_record(folder))
    with replacing(folder / HTML_NAME) as path:
        path.write_text(page, encoding="utf-8")


def html_page(rows: Sequence[SentenceRow], sentences: Sequence[Shown], record: Record) -> str:
    """A page without any other file or address."""
    title = html.escape(f"{record['model']['name']}: {record['title']}")
    body = [
        f"<h1>{title}</h1>",
        '<p>Words that may be <span class="free">replaced</span> are underlined; point at one for its substitutes. '
        'Words in <span class="unknown">italics</span> are not in the vocabulary. For each budget, the most words that '
        "are replaced, there is the worst replacement found: ruled out as an attack where the sentence is "
        '<b class="certified">certified</b>, for then none changes the class.</p>',
        f"<pre>{html.escape(chr(10).join(summary_lines(record['summary'])))}</pre>",
    ]
    for group, shown in zip(by_sentence(rows), sentences, strict=True):
        name = html.escape(record["class_names"][group[0].label])
        words = " ".join(_html_word(shown, place) for place in range(len(shown.words)))
        lines = group[:1] if group[0].verdict == WRONG else group
        table = "".join(_html_line(row, shown) for row in lines)
        head = f"#{shown.index} &middot; class <b>{name}</b> &middot; margin {group[0].margin:.4g}"
        body.append(f'<section><div class="head">{head}</div><div>{words}</div><table>{table}</table></section>')
    encoding = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{encoding}<title>{title}</title><style>\n{STYLE}\n</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_word(shown: Shown, place: int) -> str:
    word, substitutes = html.escape(shown.words[place]), html.escape(", ".join(shown.substitutes[place]))
    if substitutes:
        return f'<span class="free" title="{substitutes}">{word}</span>'
    return word if shown.known[place] else f'<span class="unknown">{word}</span>'


def _html_line(row: SentenceRow, shown: Shown) -> str:
    if row.verdict == WRONG:
        return f"<tr><td>{SAYS[WRONG]}</td></tr>"
    kind = "open" if row.verdict == UNKNOWN else row.verdict
    changed = replacements(row)
    words = " ".join(
        f"<mark>{html.escape(changed[place])}</mark>" if place in changed else html.escape(word)
        for place, word in enumerate(shown.words)
    )
    cells = (str(row.budget), f"<b>{row.verdict}</b>", html.escape(_margins(row)), f"{SAYS[row.verdict]}: {words}")
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
