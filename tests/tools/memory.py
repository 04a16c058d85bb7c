"""A run of the main job that measures its own memory: python memory.py OPTIONS… (under any launcher).

Each rank writes memory-RANK.json to the run's folder. Memory is in bytes of the rank's own anonymous memory, so mapped
files do not count:

    start    when everything is imported and nothing is loaded
    peak     the most above the start, from building the policy to the last step
    state    what closing the policy's engine frees: weights, optimizer, and all else that stays between two steps
    tokens   the tokens of the largest micro-batch
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Callable

from dpo_ds.config import parse_options
from dpo_ds.engine import join
from dpo_ds.ranks import console
from dpo_ds.reports.watcher import Watcher


def resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def settled() -> int:
    """The memory in use, once garbage is collected and free pages are returned."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


class Peak:
    """The highest value of `measure` since this object was made. It is read every so many seconds."""

    def __init__(self, measure: Callable[[], int] = resident, every: float = 0.002):
        self.value, self.measure, self.every = 0, measure, every
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.value = max(self.value, self.measure())
            time.sleep(self.every)


class Memory(Watcher):
    """Notes the peak until the last step, and the tokens of the largest micro-batch."""

    def __init__(self, found: dict):
        self.found, self.peak = found, Peak()

    def learned(self, batch) -> None:
        self.found["tokens"] = max(self.found.get("tokens", 0), batch.input_ids.numel())

    def ended(self) -> None:
        self.found["peak"] = self.peak.value - self.found["start"]


def main() -> None:
    options = parse_options(sys.argv[1:])
    here = join.join()
    from dpo_ds import train as job
    from dpo_ds.engine.engine import Engine
    from dpo_ds.runs.prepare import prepare

    run = prepare(options, here)
    found = {"rank": here.rank, "start": settled()}
    plain_close = Engine.close

    def close(self):
        before = settled()
        plain_close(self)
        found["state"] = before - settled()

    Engine.close = close
    job.train(run, [Memory(found)])
    (run.folder / f"memory-{here.rank}.json").write_text(json.dumps(found))
    console.leave()


if __name__ == "__main__":
    main()
