"""The loop: what a step waits for."""

import json

import launching
import tiny

PROBE = '''
import json, sys, traceback
from pathlib import Path

from torch.overrides import TorchFunctionMode

WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "allclose"} | {
    "__bool__", "__float__", "__int__", "__index__"
}


class Waits(TorchFunctionMode):
    """Notes who asks for a tensor's value (on a GPU the host then waits for the device); of this thread."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in WAITS or (name == "to" and "cpu" in map(str, args)):
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            asker = next(f for f in reversed(files) if "/torch/" not in f)
            if not asker.endswith("scoring/packed.py"):  # segments are on the host
                self.seen.append((name, asker))
        return function(*args, **(kwargs or {}))


from dpo_ds import train
from dpo_ds.config import parse_options
from dpo_ds.engine import join
from dpo_ds.ranks import console
from dpo_ds.reports.watcher import Watcher
from dpo_ds.runs.prepare import prepare


class Steps(Watcher):
    def __init__(self):
        self.found = []

    def step_begins(self, step):
        self.waits = Waits()
        self.waits.__enter__()

    def step_ended(self, metrics):
        self.waits.__exit__(None, None, None)
        self.found.append(self.waits.seen)


steps, here = Steps(), join.join()
out, argv = json.loads(sys.argv[1])
for tokens in (200, 4000):
    options = parse_options([*argv, f"--micro_batch_tokens={tokens}", f"--output_dir={out}-{tokens}"])
    train.train(prepare(options, here), [steps])
Path(out).write_text(json.dumps(steps.found))
console.leave()
'''


def test_a_step_waits_for_the_device_once(tmp_path):
    """Micro-batches follow each other without a wait; the metrics are read once, at the step's end. DeepSpeed's own
    waits (its check for overflow, the norm) come with its optimizer's step, not with a micro-batch."""
    (tmp_path / "stage2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "probe.py").write_text(PROBE)
    argv = [
        f"--model={tiny.make('llama', tmp_path / 'llama')}", "--dataset=sample", "--max_steps=3", "--eval_pairs=0",
        f"--ds_config={tmp_path / 'stage2.json'}", f"--cache_dir={tmp_path / 'cache'}", "--global_batch_pairs=8",
        "--max_length=96", "--export=none", "--generations=0", "--reference=live",
    ]  # fmt: skip
    out = tmp_path / "waits.json"
    launching.run(1, tmp_path / "probe.py", json.dumps([str(out), argv]))
    steps = json.loads(out.read_text())
    assert len(steps) == 6
    for waits in steps:
        assert [name for name, asker in waits if "/deepspeed/" not in asker] == ["tolist"], waits
    assert len({len(waits) for waits in steps}) == 1, "as many waits with several micro-batches as with one"
