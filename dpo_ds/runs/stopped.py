"""A run that its own figures have stopped: it leaves stopped.json in its folder.

The remedy is another option, mostly a lower learning rate. With it the run is another one, and a folder is one run's.
So a start with other options puts the stopped run's files into a folder stopped/ within its own, and begins again.
"""

import itertools
import json
import shutil
from pathlib import Path

from dpo_ds.errors import files_of
from dpo_ds.files import write_whole
from dpo_ds.runs.lock import FILE as LOCK
from dpo_ds.runs.lock import OWNER

FILE = "stopped.json"
ASIDE = "stopped"


def mark(folder: Path, reason: str) -> None:
    """Notes that the folder's run was stopped."""
    write_whole(folder / FILE, json.dumps({"reason": reason}))


def is_stopped(folder: Path) -> bool:
    return (folder / FILE).is_file()


def go_on(folder: Path) -> None:
    """The run is started again as it was."""
    (folder / FILE).unlink(missing_ok=True)


def put_aside(folder: Path) -> Path:
    """Moves a stopped run's files into a folder of their own within its folder, and returns that.

    run.json and the mark stay until the next run has written its own: a start that is killed before is done again.
    """
    names = itertools.chain([ASIDE], (f"{ASIDE}-{number}" for number in itertools.count(2)))
    aside = next(path for name in names if not (path := folder / name).exists())
    stay = {LOCK, OWNER, FILE, "run.json"}
    with files_of("--output_dir", folder):
        aside.mkdir()
        shutil.copy(folder / "run.json", aside)
        for path in folder.iterdir():
            if path.name not in stay and path.name.partition("-")[0] != ASIDE:
                path.rename(aside / path.name)
    return aside
