"""--report_to: the run's record in TensorBoard, Weights & Biases, MLflow and Trackio, through their own libraries.

Metrics have the names that transformers gives them in each tracker, so that dashboards made for TRL show them. A run
that goes on stays one run in the tracker, and no step is there twice: the tracker's id of the run is kept in
trackers.json, and each tracker knows what it holds.

Nothing but the options and the record leaves the machine: no environment, no command line, no output of the terminal.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import time
import uuid
from pathlib import Path

from dpo_ds.config import Options, trackers_of
from dpo_ds.errors import UserError, one_line
from dpo_ds.files import write_whole
from dpo_ds.reports.record import HELD_OUT, NEVER, Reader, Record, is_evaluation
from dpo_ds.reports.wandb_files import last_step
from dpo_ds.secrets import masked

PROJECT = "dpo_ds"  # where neither the library's own variables nor its configuration name another
MLFLOW_SECONDS = 5.0  # between two calls of its server, each of which a step waits for
MLFLOW_MOST = 900  # metrics of one call; it takes 1,000


def require_trackers(options: Options) -> None:
    """Raises UserError if a tracker's library is missing, or if W&B needs a login."""
    for name in trackers_of(options):
        # A folder of the same name in the working directory, such as W&B's own, is no library.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UserError(f"--report_to {name} needs its library, which is not installed: pip install {name}")
    if "wandb" in trackers_of(options) and os.environ.get("WANDB_MODE", "online") == "online":
        wandb = importlib.import_module("wandb")
        try:
            known = wandb.login(prompt=False)
        except TypeError:  # before 0.31 it can only ask
            return
        except Exception as error:
            raise UserError(
                f"--report_to wandb: {one_line(error)}; WANDB_MODE=offline works without a server"
            ) from error
        if not known:
            raise UserError("--report_to wandb needs a login: run wandb login, or set WANDB_MODE=offline")


def readers_of(folder: Path, options: Options) -> list[Reader]:
    """The trackers that --report_to names. `folder` is the run's."""
    return [KINDS[name](folder, options) for name in trackers_of(options)]


class Tracker(Reader):
    """One tracker's run."""

    failed = "the run goes on without it, and the same command, started again, sends what is missing from metrics.jsonl"

    def __init__(self, folder: Path, options: Options):
        self.folder, self.facts = folder, without_secrets(options)
        self.held: dict[bool, int] = {}  # the last step that the tracker holds: of evaluations, of training

    def begin(self, kept: Record, steps: int) -> None:
        self.held = self.open(kept)
        for line in kept.lines():
            self._send_if_new(line)

    def read(self, line: dict) -> None:
        self._send_if_new(line)

    def _send_if_new(self, line: dict) -> None:
        evaluation = is_evaluation(line)
        if line["step"] > self.held[evaluation]:
            self.write(line["step"], numbers(line, evaluation))

    def open(self, kept: Record) -> dict[bool, int]:
        """Begins the tracker's run, or goes on with it. Returns `held`."""
        raise NotImplementedError

    def write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def known(self, **new: str) -> dict[str, str]:
        """What the tracker calls this run: as trackers.json says, else `new`, which is written there."""
        file = self.folder / "trackers.json"
        everything = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if new and self.name not in everything:
            write_whole(file, json.dumps({**everything, self.name: new}, indent=1))
        return everything.get(self.name, new)


class TensorBoard(Tracker):
    """Its event files are in the run's folder. Steps that run again replace the earlier ones, as TensorBoard does it
    for a job that was restarted (purge_step)."""

    name = "tensorboard"

    def open(self, kept: Record) -> dict[bool, int]:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        last = kept.last_steps() if folder.is_dir() else {False: NEVER, True: NEVER}
        done = max(last.values())
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if folder.is_dir() else None)
        if done == NEVER:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self.facts.items())
            self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", 0)
        return last

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def begin(self, kept: Record, steps: int) -> None:
        super().begin(kept, steps)
        self.writer.flush()

    def read(self, line: dict) -> None:
        """By itself it writes after two minutes. What metrics.jsonl holds must be here too: `open` counts on that."""
        super().read(line)
        self.writer.flush()

    def end(self, finished: bool) -> None:
        self.writer.close()


class RowTracker(Tracker):
    """A tracker that takes a step's metrics in one call: the evaluation's stand beside the training's."""

    def __init__(self, folder: Path, options: Options):
        super().__init__(folder, options)
        self.row: dict[str, float] = {}  # what `settle` sends
        self.step = 0

    def write(self, step: int, values: dict[str, float]) -> None:
        if step != self.step:
            self.settle()
        self.step = step
        self.row |= values

    def settle(self) -> None:
        if self.row:
            self.log(self.row)
            self.row = {}

    def log(self, row: dict[str, float]) -> None:
        """Sends the metrics of `self.step`."""
        raise NotImplementedError


class WandB(RowTracker):
    """W&B takes a step once, in order: steps that run again keep their first values."""

    name = "wandb"

    def open(self, kept: Record) -> dict[bool, int]:
        import wandb

        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, silent=not sys.stderr.isatty()
        )
        place = os.environ.get("WANDB_DIR", str(self.folder))
        run = self.known(id=uuid.uuid4().hex[:8])["id"]
        unsynced = last_step(Path(place), run)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", self.folder.name),
            dir=place,
            id=run,
            resume="allow",
            config=self.facts,
            settings=settings,
        )
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        last = self.run.step - 1 if self.run.resumed else NEVER
        if unsynced is not None:
            last = max(last, unsynced)
        return {False: last, True: last}

    def log(self, row: dict[str, float]) -> None:
        self.run.log({**row, "train/global_step": self.step}, step=self.step, commit=True)

    def end(self, finished: bool) -> None:
        self.settle()
        self.run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
    """MLflow keeps every value that a metric was ever given: steps that run again keep their first values."""

    name = "mlflow"

    def open(self, kept: Record) -> dict[bool, int]:
        import mlflow

        self.client = mlflow.MlflowClient()
        self.waiting: list = []
        self.sent = time.monotonic()
        known = self.known()
        if not known:
            run = self.client.create_run(self._experiment(), run_name=self.folder.name)
            self.id = self.known(run_id=run.info.run_id)["run_id"]
            self._log_options()
            return {False: NEVER, True: NEVER}
        self.id = known["run_id"]
        self.client.update_run(self.id, status="RUNNING")
        return {False: self._last("loss"), True: self._last("eval_loss")}

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(mlflow_name(name), value, now, step) for name, value in values.items()]
        if len(self.waiting) > MLFLOW_MOST:
            self._send()

    def settle(self) -> None:
        # What waits when a run is killed is sent when it goes on: it is not yet in the history that `open` reads.
        if time.monotonic() - self.sent > MLFLOW_SECONDS:
            self._send()

    def end(self, finished: bool) -> None:
        self._send()
        self.client.set_terminated(self.id, "FINISHED" if finished else "FAILED")

    def _experiment(self) -> str:
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def _log_options(self) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:500]) for name, value in self.facts.items()]
        for start in range(0, len(params), 100):  # the most that it takes at once
            self.client.log_batch(self.id, params=params[start : start + 100])

    def _last(self, metric: str) -> int:
        return max((point.step for point in self.client.get_metric_history(self.id, metric)), default=NEVER)

    def _send(self) -> None:
        for start in range(0, len(self.waiting), MLFLOW_MOST):
            self.client.log_batch(self.id, metrics=self.waiting[start : start + MLFLOW_MOST])
        self.waiting, self.sent = [], time.monotonic()


class Trackio(RowTracker):
    """Trackio adds a row for every call: steps that run again keep their first values."""

    name = "trackio"

    def open(self, kept: Record) -> dict[bool, int]:
        import trackio

        known = self.known(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), run=f"{self.folder.name}-{uuid.uuid4().hex[:6]}"
        )
        # A Space (TRACKIO_SPACE_ID) would be public by default.
        self.run = trackio.init(
            known["project"], name=known["run"], config=self.facts, resume="allow", private=True, embed=False
        )
        last = self.run._next_step - 1
        return {False: last, True: last}

    def log(self, row: dict[str, float]) -> None:
        self.run.log(row, step=self.step)

    def end(self, finished: bool) -> None:
        self.settle()
        self.run.finish()


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow, Trackio)}


def numbers(line: dict, evaluation: bool) -> dict[str, float]:
    """The line's metrics as transformers names them in a tracker: train/loss, eval/loss. What is null is left out."""
    begin = "" if evaluation else "train/"
    return {begin + name: float(value) for name, value in line.items() if name != "step" and value is not None}


def mlflow_name(name: str) -> str:
    """transformers' names in MLflow: loss, eval_loss. A loss's part is loss_sft: MLflow may keep metrics as files, and
    loss cannot be both a file and a folder."""
    name = name.removeprefix("train/").replace(HELD_OUT, "eval_", 1)
    return name.replace("loss/", "loss_", 1)


def without_secrets(options: Options) -> dict[str, object]:
    """The options, without what looks like a secret in a path or an address."""
    values = dataclasses.asdict(options)
    return {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}
