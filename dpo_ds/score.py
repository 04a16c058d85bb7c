"""Makes the reference table before training.

python -m dpo_ds.score --model gpt2 --dataset pairs.jsonl        (takes the options of dpo_ds.train)

With --output table.parquet, the table is also written to a file, for --reference_table on another machine.
"""

import argparse
from pathlib import Path

from dpo_ds.config import parse_options
from dpo_ds.errors import UserError
from dpo_ds.losses.table import reads_reference
from dpo_ds.ranks import console


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    own, rest = parser.parse_known_args(argv)
    if own.output is not None and own.output.is_dir():
        raise UserError(f"--output {own.output} is a folder: name a file, such as {own.output / 'table.parquet'}")
    options = parse_options(rest, "score")
    if options.reference_table is not None:
        raise UserError("--reference_table is a table already, so there is nothing to score: leave it out")
    if not reads_reference(options):
        raise UserError(f"--loss {options.loss} reads no reference, so there is nothing to score: leave it out")
    from dpo_ds.engine import join
    from dpo_ds.plan.machine import require_here
    from dpo_ds.ranks import world
    from dpo_ds.references.table import facts_of, reference_tables
    from dpo_ds.runs.prepare import prepare
    from dpo_ds.runs.table_file import write_table

    require_here(options)
    run = prepare(options, join.join(), claim=False)
    tables = reference_tables(run, everything=True)
    if own.output is not None and world.from_environment().speaks:
        sets = list(zip((run.train_pairs, run.eval_pairs), tables, strict=True))
        write_table(own.output, sets, {"model": run.reference.model.name, **facts_of(run.reference, run.options)})
        console.say(f"reference table: {own.output}")


if __name__ == "__main__":
    console.run_main(main)
