"""Writes what the documents take from the code: python docs/make.py [PAGE ...]

    docs/package.svg           the wings and what they import, from the import statements
    docs/options.md            every option, from dpo_ds.config.Options
    docs/losses.md             the losses, from dpo_ds.losses.table, and how far each is from TRL's
    docs/losses.svg            each loss over the margin (not by default: matplotlib's versions draw differently)
    docs/data.md               the forms of a row, from dpo_ds.data.rows.forms
    docs/models.md             the twelve models and their checks, from tests/launches/test_models.py
    launch/recipes/README.md   the plan of each recipe's model, from dpo_ds.plan (a minute)

A page's own text stays: only what lies between the two marks is written. tests/unit/test_docs.py makes all but the
last again and compares, tests/unit/test_recipes.py the last.
"""

import ast
import dataclasses
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable
from html import escape
from pathlib import Path

from dpo_ds.config import Options, group_of, help_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpo_ds"
BEGIN, END = "<!-- python docs/make.py writes what follows -->", "<!-- as far as here -->"

# Top down: a file imports from its own wing and from those below it.
WINGS = ["doctor", "references", "runs", "plan", "engine", "reports", "scoring", "models", "data", "ranks", "losses"]
COMMANDS = [
    "train",
    "trainer",
    "learner",
    "score",
    "evaluate",
    "export",
    "replay",
    "report",
    "deepspeed_command",
]  # above all wings
TOP, BOTTOM = "commands and the loop", "what everything may use"
ORDER = [TOP, *WINGS, BOTTOM]


# ----------------------------------------------------------------------------------------------------- the picture


def home(module: str) -> str:
    """Where a module of the package belongs: `engine.build` -> engine, `train` -> TOP, `config` -> BOTTOM.

    A wing's __main__ is a command: `python -m dpo_ds.data` uses what is above its wing.
    """
    if module.endswith(".__main__"):
        return TOP
    first = module.partition(".")[0]
    if first in WINGS:
        return first
    return TOP if first in COMMANDS else BOTTOM


def imports() -> dict[str, set[str]]:
    """Which of ORDER's places each imports from, wherever in a file the import statement stands."""
    found: dict[str, set[str]] = {place: set() for place in ORDER}
    for file in sorted(PACKAGE.rglob("*.py")):
        place = home(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "dpo_ds":
                names = [f"dpo_ds.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            found[place] |= {home(name.removeprefix("dpo_ds.")) for name in names if name.startswith("dpo_ds.")}
    return {place: targets - {place} for place, targets in found.items()}


def drawn(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer path implies. Those to the bottom are left out: everything may use it."""
    reach: dict[str, set[str]] = {}
    for place in reversed(ORDER):
        reach[place] = set().union(*({target} | reach.get(target, set()) for target in graph[place]))
    return [
        (place, target)
        for place in ORDER
        for target in sorted(graph[place] - {BOTTOM}, key=ORDER.index)
        if not any(target in reach.get(other, set()) for other in graph[place])
    ]


def about(place: str) -> str:
    """What a wing is: the first sentence of its docstring. For top and bottom: what lies there."""
    if place in WINGS:
        text = ast.get_docstring(ast.parse((PACKAGE / place / "__init__.py").read_text(encoding="utf-8")))
        return re.split(r"\.(?:\s|$)", " ".join(text.split()))[0]
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    names = sorted(f"{path.stem}/" if path.is_dir() else path.name for path in entries if path.name != "__init__.py")
    return ", ".join(name for name in names if home(name.rstrip("/").removesuffix(".py")) == place)


LEFT, WIDTH, TITLE, LINE, GAP, LANE = 20, 600, 24, 16, 24, 28  # pixels
STYLE = """text { font: 12px sans-serif; fill: #222 } .name { font: bold 14px monospace } .small { fill: #666 }
rect { fill: #f3f6fa; stroke: #7a8ca5 } .arrow { fill: none; stroke: #44597a; stroke-width: 1.5 }"""


def picture() -> str:
    """The wings as boxes, top down, and their imports as arrows: straight to the next box, else by a lane beside."""
    graph = imports()
    boxes, body, top = {}, [], 20
    for place in ORDER:
        lines = textwrap.wrap(about(place), 86)
        uses = sorted(graph[place] - {BOTTOM}, key=ORDER.index)
        height = TITLE + LINE * (len(lines) + bool(uses)) + 8
        boxes[place] = (top, height)
        name = f"{place}/" if place in WINGS else place
        body.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{height}" rx="6"/>')
        body.append(f'<text class="name" x="{LEFT + 12}" y="{top + 19}">{escape(name)}</text>')
        for n, line in enumerate(lines):
            body.append(f'<text x="{LEFT + 12}" y="{top + 37 + LINE * n}">{escape(line)}</text>')
        if uses:
            words = "imports " + ("all wings" if set(uses) == set(WINGS) else ", ".join(uses))
            body.append(f'<text class="small" x="{LEFT + 12}" y="{top + 37 + LINE * len(lines)}">{words}</text>')
        top += height + GAP
    lanes, right, arrivals = 0, LEFT + WIDTH, dict.fromkeys(ORDER, 0)
    for place, target in sorted(drawn(graph), key=lambda arrow: ORDER.index(arrow[1]) - ORDER.index(arrow[0])):
        start, stop = ORDER.index(place), ORDER.index(target)
        (y, height), (to, _) = boxes[place], boxes[target]
        if stop == start + 1:
            x = LEFT + WIDTH // 2
            path = f"M {x} {y + height} V {to - 2}"
        else:
            lanes += 1
            x, into = right + LANE * lanes, to + 12 + 8 * arrivals[target]
            arrivals[target] += 1
            path = f"M {right} {y + height - 8 - 4 * lanes % 16} H {x} V {into} H {right + 2}"
        body.append(f'<path class="arrow" d="{path}" marker-end="url(#head)"/>')
    width, height = right + LANE * (lanes + 1) + LEFT, top - GAP + 20
    head = '<path d="M 0 0 L 8 4 L 0 8 z" style="fill: #44597a"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="The wings of dpo_ds and what they import">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse">{head}</marker></defs>',
            f'<rect x="0" y="0" width="{width}" height="{height}" style="fill: white; stroke: none"/>',
            *body,
            "</svg>\n",
        ]
    )


# ---------------------------------------------------------------------------------------------------- the tables


def options_table() -> str:
    """A table of the options; one for each group where the fields name theirs."""
    hints = typing.get_type_hints(Options)
    lines, group = [], object()
    for field in dataclasses.fields(Options):
        if group_of(field.name) != group:
            group = group_of(field.name)
            lines += ["", f"## {group[:1].upper()}{group[1:]}", ""] if group else [""]
            lines += ["| option | value | default | what it does |", "|---|---|---|---|"]
        help_text = help_of(field.name).replace("|", r"\|").replace("<", "&lt;")
        cells = [f"`--{field.name}`", _values(hints[field.name]), _default(field), help_text]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _values(hint) -> str:
    arguments = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    kind = arguments[0] if arguments else hint
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}.get(kind) or _values(kind)


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value in (None, ""):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def losses_table() -> str:
    """The losses with what each needs, the options of all, and the largest difference from TRL."""
    from dpo_ds.losses.table import LOSSES, Settings

    parity = json.loads((ROOT / "benchmarks" / "results" / "parity_trl.json").read_text())["runs"]
    lines = ["| loss | when | what beta means | its options | it reads | from TRL's | paper |", "|---" * 7 + "|"]
    for name, loss in LOSSES.items():
        defaults = dataclasses.asdict(Settings()) | dict(loss.defaults)
        meaning = "as DPO's" if loss.beta == LOSSES["sigmoid"].beta and name != "sigmoid" else loss.beta
        beta = f"{meaning}; `{defaults['beta']:g}`" if loss.beta else "–"
        own = [f"`--{option} {defaults[option]:g}`" for option in loss.options if not option.startswith("f_")]
        options = ", ".join(own + ["`--f_divergence`"] * ("f_divergence" in loss.options)) or "–"
        cells = [f"`{name}`", loss.use, beta, options, _reads(loss), _parity(name, parity), loss.paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reads(loss) -> str:
    """What a loss reads besides the policy's log-probabilities of the pair."""
    names = {"reference": loss.reference, "lengths": loss.lengths, "the data's margins": loss.margins}
    scope = {"pair": [], "group": ["the whole ranking"], "step": ["the whole step"]}[loss.scope]
    return ", ".join([name for name, read in names.items() if read] + scope) or "–"


def _parity(name: str, parity: dict) -> str:
    runs = [parity[run] for run in (f"{name}-full", f"{name}-lora") if run in parity]
    if not runs:
        return "–"
    if "known" in runs[0]:
        return f"differs: {runs[0]['known']}"
    return f"{max(max(run['loss off by'], run['gradient norm off by']) for run in runs):.0e}"


def losses_picture() -> str:
    """Each loss over the margin of a pair's log-ratios, at its default options."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot

    from dpo_ds.losses import formulas
    from dpo_ds.losses.compared import Compared
    from dpo_ds.losses.table import LOSSES, losses_of

    matplotlib.rcParams["svg.hashsalt"] = "dpo_ds"
    figure, places = pyplot.subplots(6, 4, figsize=(11, 13), layout="constrained")
    margins = torch.linspace(-60, 60, 241, dtype=torch.float64)
    for axes, name in zip(places.flat, LOSSES, strict=True):
        ranked = {"pairs": "adjacent"} if name == "plackett_luce" else {}
        (term,) = losses_of(Options(model="tiny-gpt2", loss=name, **ranked))
        values = []
        for margin in margins:  # one pair at a time: no loss sees another
            x = Compared(
                policy=torch.stack([margin / 2 - 100, -margin / 2 - 100])[None],
                reference=torch.full((1, 2), -100.0, dtype=torch.float64),
                lengths=torch.full((1, 2), 100),
                answers=torch.tensor([[0, 1]]),
                rankings=torch.zeros(1, dtype=torch.int64),
                margins=torch.full((1,), 2.0, dtype=torch.float64),
                weights=torch.ones(1, dtype=torch.float64),
                mean_length=100.0,
            )
            values.append(float(getattr(formulas, name)(x, term.settings)[0]))
        axes.plot(margins, values, color="#2a5ea8")
        axes.axvline(0, color="#bbb", linewidth=0.8)
        axes.set_title(name, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("margin in nats: log policy / reference of the chosen answer minus that of the rejected one")
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def models_table() -> str:
    """A tick for every model and check of tests/launches/test_models.py, and each check's docstring."""
    file = ROOT / "tests" / "launches" / "test_models.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    (checks,) = (
        [name.id for name in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHECKS"
    )
    titles = [name.replace("_", " ") for name in checks]
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (len(checks) + 1) + "|"]
    lines += [
        f"| `{model}` |" + " ✓ |" * len(checks) for model in json.loads((PACKAGE / "model_shapes.json").read_text())
    ]
    lines.append("")
    lines += [f"- **{title}**: {' '.join(functions[name].split())}" for title, name in zip(titles, checks, strict=True)]
    return "\n".join(lines)


def forms_tables() -> str:
    """The forms of a row: how it gives its answers, its prompt, and what may stand beside them."""
    from dpo_ds.data.rows.forms import BESIDE, FORMS, WITHOUT_PROMPT

    lines = []
    for half, title in (("answers", "The answers, and which is better"), ("prompt", "The prompt")):
        lines += [f"### {title}", "", "| columns | what they hold | found in | a row |", "|---|---|---|---|"]
        forms = [form for form in FORMS if form.half == half]
        lines += [f"| {form.columns} | {form.shapes} | {form.source} | {_row(form.example)} |" for form in forms]
        lines.append("")
    for title, heading, rows in (
        ("Without a column for the prompt", "the answers are", WITHOUT_PROMPT),
        ("Beside them", "columns", BESIDE),
    ):
        what = "the prompt is" if rows is WITHOUT_PROMPT else "what they do"
        lines += [f"### {title}", "", f"| {heading} | {what} | a row |", "|---|---|---|"]
        lines += [f"| {columns} | {meaning} | {_row(example)} |" for columns, meaning, example in rows]
        lines.append("")
    return "\n".join(lines).strip()


def _row(example: dict) -> str:
    return f"`{json.dumps(example, ensure_ascii=False)}`"


def plan_table() -> str:
    from dpo_ds.engine import join
    from dpo_ds.plan.__main__ import everything

    join.quiet_start()
    return everything()


TABLES: dict[str, Callable[[], str]] = {
    "docs/options.md": options_table,
    "docs/models.md": models_table,
    "docs/losses.md": losses_table,
    "docs/data.md": forms_tables,
    "launch/recipes/README.md": plan_table,
}
PAGES = ["docs/package.svg", *TABLES]


def page(name: str) -> str:
    """A page's whole text as it should be."""
    if name not in TABLES:
        return losses_picture() if name == "docs/losses.svg" else picture()
    before, rest = (ROOT / name).read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{TABLES[name]()}\n\n{END}{rest.split(END)[1]}"


def main(names: list[str]) -> None:
    for name in names or PAGES:
        (ROOT / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
