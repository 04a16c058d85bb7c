"""A run of the main job that measures its own memory: python memory.py OPTIONS… (under any launcher).

Each rank writes memory-RANK.json to the run's folder: bytes of its own anonymous memory (mapped files do not count) at
the start, when all is imported and nothing loaded; the peak above that, in building the policy and in the steps; and
the state, what closing the policy's engine gives back: weights, optimizer and what else stays between two steps. Beside
them tokens, the most of a micro-batch.
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
    """What is in use: garbage collected, free pages given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


class Peak:
    """The highest `measure` since it was made, looked at every two milliseconds."""

    def __init__(self, measure: Callable[[], int] = resident):
        self.value, self.measure = 0, measure
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.value = max(self.value, self.measure())
            time.sleep(0.002)


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
