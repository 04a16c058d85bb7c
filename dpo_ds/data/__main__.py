"""Shows what will be trained: the counts, the lengths, and a few rows as the tokens that a run reads.

    python -m dpo_ds.data pairs.jsonl --model Qwen/Qwen2-7B-Instruct
    python -m dpo_ds.data pairs.jsonl --model Qwen/Qwen2-7B-Instruct --html pairs.html

It takes the options of dpo_ds.train, so that it shows what a run with them trains. It loads no weights. The tokenised
set stays in the cache for that run.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.config import FIELDS, Options, Parser, group_of, parse_options
from dpo_ds.errors import UserError, files_of
from dpo_ds.files import write_whole
from dpo_ds.ranks import console, world

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    from transformers import PreTrainedTokenizerBase

    from dpo_ds.data.view import ShownGroup
    from dpo_ds.runs.data import Loaded, Reports

# Of the group "the data" and these, options decide what is shown.
ALSO = ("dataset_split", "dataset_config", "columns", "pairs", "min_margin", "eval_dataset", "eval_pairs", "cache_dir")


def parse(argv: list[str]) -> tuple[argparse.Namespace, Options]:
    """This command's own options, and the run's."""
    shared = [name for name in FIELDS if name in ALSO or group_of(name) == "the data"]
    parser = Parser(
        prog="python -m dpo_ds.data",
        usage="%(prog)s [DATASET] --model MODEL [--rows N | --row N] [--html [FILE]] [--plots FOLDER] [--name value …]",
        description="Shows what will be trained. Without DATASET: the default set of dpo_ds.train.",
        epilog="All options of dpo_ds.train may follow. These decide what is shown: --" + ", --".join(shared) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, metavar="N", help="Prompts to show with their answers (default: 3).")
    parser.add_argument("--row", type=int, metavar="N", help="Show this row, as the report counts them: from 0.")
    parser.add_argument(
        "--html", nargs="?", const="", metavar="FILE", help="Write the page as well (default: into runs/)."
    )
    parser.add_argument("--plots", metavar="FOLDER", help="Write the histograms of lengths as PNG files.")
    own, rest = parser.parse_known_args(argv)
    if own.rows is not None and own.row is not None:
        raise UserError("--rows and --row exclude each other: leave out one of them")
    for name in ("rows", "row"):
        if (getattr(own, name) or 0) < 0:
            raise UserError(f"--{name} is {getattr(own, name)}, but must be 0 or more")
    options = parse_options(rest, "data", positional="dataset")
    if own.html == "":
        own.html = f"runs/{Path(options.model).name}-{Path(options.dataset).name.split('.')[0]}.html"
    if own.html is not None and not own.html.endswith((".html", ".htm")):  # DATASET may stand behind a bare --html
        raise UserError(f"--html {own.html}: name a file that ends in .html, and put DATASET before --html")
    return own, options


def main(argv: list[str]) -> None:
    own, options = parse(argv)
    if own.plots is not None:
        from dpo_ds.reports.histogram import require_drawing

        require_drawing("--plots")
    try:
        show(own, options)
    except BrokenPipeError:  # `| head` has read enough; the interpreter's own flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(own: argparse.Namespace, options: Options) -> None:
    """Reads the pairs as a run does, and shows them."""
    import transformers

    from dpo_ds.data.counts import counted
    from dpo_ds.data.view import Summary
    from dpo_ds.models.files import load_tokenizer
    from dpo_ds.models.find import find_model
    from dpo_ds.reports.data_listing import Listing
    from dpo_ds.runs.data import read_pairs

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = find_model(options.model, options.trust_remote_code)
    options = options.replace(max_length=model.max_length(options.max_length))
    tokenizer = load_tokenizer(model)
    loaded = read_pairs(options, tokenizer, world.from_environment(), datetime.date.today().isoformat())
    summary, groups = Summary.of(loaded.train), shown_groups(own, loaded, tokenizer)
    held_out = f"{counted(len(loaded.held_out), 'held-out pair')}: {counted(len(loaded.held_out.prompts), 'prompt')}"
    listing = Listing()
    listing.summary(summary, held_out)
    listing.groups(groups)
    if own.plots is not None:
        from dpo_ds.reports.histogram import histogram

        with files_of("--plots", own.plots):
            Path(own.plots).mkdir(parents=True, exist_ok=True)
            for name, numbers in summary.lengths.items():
                file = Path(own.plots, f"{name.replace(' ', '_')}.png")
                file.write_bytes(histogram(numbers, f"tokens of a {name}"))
        console.say(f"histograms: {own.plots}")
    if own.html is not None:
        from dpo_ds.reports.data_page import data_page

        facts = {
            "--model": options.model,
            "--dataset": options.dataset,
            "--max_length": str(options.max_length),
            "--truncation": options.truncation,
            "--chat_template": options.chat_template if tokenizer.chat_template else "none (the tokenizer has none)",
        }
        reports = loaded.train_reports
        if loaded.held_out_reports is not reports:
            reports = reports + loaded.held_out_reports
        page = data_page("What will be trained", facts, reports, [held_out, *loaded.notes], summary, groups)
        with files_of("--html", own.html):
            Path(own.html).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(own.html), page)
        console.say(f"page: {own.html}")


def shown_groups(own: argparse.Namespace, loaded: "Loaded", tokenizer: "PreTrainedTokenizerBase") -> "list[ShownGroup]":
    """The first --rows prompts of the training set, or the one of --row, which may be held out."""
    from dpo_ds.data.view import first_groups, groups_of_row, shown_group

    names = [name for name, _ in loaded.train_reports]
    if own.row is None:
        first = first_groups(loaded.train, 3 if own.rows is None else own.rows)
        return [shown_group(loaded.train, group, names, tokenizer) for group in first]
    found = [shown_group(loaded.train, group, names, tokenizer) for group in groups_of_row(loaded.train, own.row)]
    if loaded.held_out_reports is loaded.train_reports:
        of_row = groups_of_row(loaded.held_out, own.row)
        found += [shown_group(loaded.held_out, group, names, tokenizer, held_out=True) for group in of_row]
    if not found:
        raise UserError(f"--row {own.row} {why_not_shown(own.row, loaded.train_reports)}")
    return found


def why_not_shown(row: int, reports: "Reports") -> str:
    rows = max(report.rows for _, report in reports)
    if row >= rows:
        return f"is not there: there are {rows} rows, counted from 0"
    reasons = [kind for _, report in reports for kind, (_, first) in report.left_out.items() if row in first]
    if reasons:
        return f"is left out: {reasons[0]}"
    return "has no pair in the set: it is left out, and the lines above count the reasons, or the mix did not take it"


if __name__ == "__main__":
    console.run_main(main)
