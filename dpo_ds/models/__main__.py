"""Prints the table of the twelve tested models.

python -m dpo_ds.models
"""

from dpo_ds.errors import UserError
from dpo_ds.models.find import known_model, known_models
from dpo_ds.ranks import console


def print_table() -> None:
    """The twelve models as a Markdown table."""
    print("| model | class | tier | tier with --lora | parameters | context |\n|---|---|---|---|---|---|")
    for name in known_models():
        model = known_model(name)
        tiers = f"`{model.tier}` | `{model.lora_tier}`"
        print(f"| `{name}` | {model.size_class.name} | {tiers} | {model.parameters:,} | {model.context:,} |")


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"python -m dpo_ds.models takes no arguments: leave out {argv[0]}")
    print_table()


if __name__ == "__main__":
    console.run_main(main)
