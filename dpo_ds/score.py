"""Makes the reference table before training.

python -m dpo_ds.score --model gpt2 --dataset pairs.jsonl        (takes the options of dpo_ds.train)
"""

from dpo_ds.config import parse_options
from dpo_ds.errors import UserError
from dpo_ds.losses.table import reads_reference
from dpo_ds.ranks import console


def main(argv: list[str]) -> None:
    options = parse_options(argv, "score")
    if not reads_reference(options):
        raise UserError(f"--loss {options.loss} reads no reference, so there is nothing to score: leave it out")
    from dpo_ds.engine import join
    from dpo_ds.references.table import reference_tables
    from dpo_ds.runs.prepare import prepare

    reference_tables(prepare(options, join.join()), everything=True)


if __name__ == "__main__":
    console.run_main(main)
