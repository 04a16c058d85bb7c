"""The paths of the data files in the package, in a checkout and once installed.

Try `python -c "from dpo_ds.resources import tier_files; print(tier_files())"`.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
MODEL_SHAPES = _PACKAGE / "model_shapes.json"


def tier_files() -> dict[str, Path]:
    """Each tier's DeepSpeed configuration: its name (`zero0_debug`) and the JSON file's path on disk."""
    # setup.py copies the checkout's ds_configs/ into the installed package; an editable install has it beside.
    installed = _PACKAGE / "ds_configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "ds_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}
