"""What will be trained, as one HTML page that needs nothing else: no script, no other file, nothing from a network."""

import base64
from collections.abc import Iterable
from html import escape

import numpy as np

from dpo_ds.data.counts import Report, named
from dpo_ds.data.view import Cut, Shown, ShownGroup, Spread, Summary, visible
from dpo_ds.reports.histogram import can_draw, histogram

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f8fa; --line: #d0d7de; --ink: #1f2328; --pale: #656d76;
  --chosen: #d3f2da; --rejected: #ffe0dd; --both: #fbeec0; --chosen-ink: #116329; --rejected-ink: #a40e26;
  --both-ink: #7d4e00; --special: #0550ae; --cut: #8250df }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --line: #30363d; --ink: #e6edf3;
  --pale: #8d96a0; --chosen: #12361f; --rejected: #4a1d1f; --both: #3d3010; --chosen-ink: #6fdd8b;
  --rejected-ink: #ff9a92; --both-ink: #e3b341; --special: #79c0ff; --cut: #d2a8ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .5rem } h4 { font-size: .85rem; margin: .75rem 0 .25rem }
p, ul { margin: .5rem 0 } .pale { color: var(--pale) } code { font: .9em/1.5 ui-monospace, monospace }
.wide { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-size: .85rem; color: var(--pale) }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td:last-child { overflow-wrap: anywhere; min-width: 3rem }
@media (max-width: 40rem) { body { padding: .75rem } table { font-size: .85rem } td, th { padding-right: .6rem } }
.row { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 1rem 0 0 } .whole { white-space: nowrap } img { width: 100%; max-width: 30rem; height: auto }
.group { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
.text { font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; margin: 0 }
.chosen mark { background: var(--chosen) } .rejected mark { background: var(--rejected) }
.both mark { background: var(--both) } mark { color: inherit; border-radius: .15rem; padding: .1rem 0 }
h4.chosen { color: var(--chosen-ink) } h4.rejected { color: var(--rejected-ink) } h4.both { color: var(--both-ink) }
.off { color: var(--pale); text-decoration: underline dotted } .special { color: var(--special); font-weight: 600 }
.cut { color: var(--cut); font-weight: 600 } .end { color: var(--pale); opacity: .6; font-style: normal }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser would refuse anything from outside


def data_page(
    title: str,
    facts: dict[str, str],
    reports: list[tuple[str, Report]],
    lines: list[str],
    summary: Summary,
    groups: list[ShownGroup],
) -> str:
    """The whole page. facts: the options that decide what is shown; lines: what else is to be said about the pairs."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(title)}</h1>",
            '<p class="pale">'
            + " · ".join(
                f"<span class='whole'>{_text(name)}</span> <code>{_text(v)}</code>" for name, v in facts.items()
            ),
            "</p>\n<h2>Rows</h2>",
            _rows(reports),
            "<h2>Pairs</h2>\n<ul>",
            *(f"<li>{_text(line)}</li>" for line in [*summary.lines(), *lines]),
            "</ul>",
            _lengths(summary),
            _plots(summary),
            "<h2>As they are trained</h2>",
            _legend(),
            *map(_group, groups),
            "</body>\n</html>\n",
        ]
    )


def _text(text: str) -> str:
    return escape(visible(text))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str | int]], numbers: Iterable[int] = ()) -> str:
    """numbers: the columns that hold numbers."""

    def cell(kind: str, n: int, value: str | int) -> str:
        shown = f"{value:,}" if isinstance(value, int) else value
        return f"<{kind}{' class=n' if n in right else ''}>{_text(shown)}</{kind}>"

    def cells(kind: str, row: Iterable[str | int]) -> str:
        return "".join(cell(kind, n, value) for n, value in enumerate(row))

    right = {*numbers}
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells("th", heads)}</tr>\n{body}\n</table></div>'


def _rows(reports: list[tuple[str, Report]]) -> str:
    """What became of the rows of each source."""
    counts: list[tuple[str | int, ...]] = [
        (name, report.rows, report.used, report.rows - report.used, report.pairs) for name, report in reports
    ]
    kinds: list[tuple[str | int, ...]] = []
    for name, report in reports:
        where = f" of {name}" if len(reports) > 1 else ""
        for verb, found in (("left out", report.left_out), ("noted", report.changed), ("not used", report.unused)):
            kinds += [
                (verb, kind, count, f"{which.strip(' ()')}{where}") for kind, count, which in report.listed(found)
            ]
        for what, (count, rows) in report.cut.items():
            kinds.append(("cut", report.cut_by(what), count, f"{named(count, rows)}{where}"))
        kinds += [(f"{noun}s", what, count, where.strip()) for noun, what, count in report.of_several()]
    table = _table(["source", "rows", "used", "left out", "pairs"], counts, range(1, 5))
    return table + (
        _table(["", "what", "count", "which"], kinds, [2]) if kinds else "<p>Every row is used as it is.</p>"
    )


def _lengths(summary: Summary) -> str:
    rows: list[tuple[str | int, ...]] = []
    for name, numbers in summary.table():
        spread = Spread.of(numbers)
        rows.append((name, *(int(n) for n in (spread.least, spread.median, spread.most, spread.longest))))
    return _table(["", "shortest", "median", "95%", "longest"], rows, range(1, 5))


def _plots(summary: Summary) -> str:
    if not can_draw():
        return '<p class="pale">For histograms, install matplotlib: <code>pip install matplotlib</code></p>'
    figures = [_figure(numbers, name) for name, numbers in summary.table() if name.startswith("tokens")]
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(numbers: np.ndarray, name: str) -> str:
    data = base64.b64encode(histogram(numbers, name)).decode()
    return f'<figure><img alt="Histogram: {_text(name)}" src="data:image/png;base64,{data}"></figure>'


def _legend() -> str:
    learned = (("chosen", "of a chosen answer"), ("rejected", "of a rejected one"), ("both", "of one that is both"))
    marks = [f'<span class="{role}"><mark>learned, {what}</mark></span>' for role, what in learned]
    looks = (("off", "not learned"), ("special", "&lt;special token&gt;"), ("cut", "[… cut by --truncation …]"))
    marks += [f'<span class="{look}">{what}</span>' for look, what in looks]
    return f'<p>{" · ".join(marks)} · <i class="end">↵</i> a new line</p>'


def _group(group: ShownGroup) -> str:
    held_out = ", held out" if group.held_out else ""
    answers = "".join(
        f'<div class="{group.role(n)}"><h4 class="{group.role(n)}">{_text(group.verdict(n))} · {len(answer.tokens):,} '
        f"tokens</h4>{_tokens(answer, 'off')}</div>"
        for n, answer in enumerate(group.answers)
    )
    return (
        f'<section class="group"><h3>{_text(group.where)}{held_out} · {group.tokens:,} tokens</h3>'
        f"<h4>prompt · {len(group.prompt.tokens):,} tokens</h4>{_tokens(group.prompt, '')}"
        f'<div class="row">{answers}</div></section>'
    )


def _tokens(shown: Shown, unscored: str) -> str:
    """unscored: the class of tokens that are not learned."""
    parts = []
    for run in shown.runs():
        if isinstance(run, Cut):
            parts.append(f'<span class="cut">[… {run.tokens:,} tokens cut …]</span>')
            continue
        text = escape(run.text).replace("\n", '<i class="end">↵</i>\n')
        look = f"{'' if run.scored else unscored} {'special' if run.special else ''}".strip()
        text = f'<span class="{look}">{text}</span>' if look else text
        parts.append(f"<mark>{text}</mark>" if run.scored else text)
    return f'<pre class="text">{"".join(parts)}</pre>'
