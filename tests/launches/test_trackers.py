"""A run that is killed and started again is one run in every tracker, as its own library reads it: no step is missing
or there twice. A tracker whose library is not installed is skipped."""

import importlib.util
import json
import os

import launching
import pytest
import tiny

from dpo_ds.config import TRACKERS

STEPS, SAVE, STOP = 30, 4, 11
EVALUATIONS = [0, 10, 20, 30]
SECRET = "hf_" + "x" * 34


def installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


FOUND = [name for name in TRACKERS if installed(name)]
needs = {name: pytest.mark.skipif(name not in FOUND, reason=f"{name} is not installed") for name in TRACKERS}


@pytest.fixture(scope="module", params=["killed", "stopped"])
def folder(request, tmp_path_factory):
    """The run's folder. The run ends after step 11 and goes on from step 8 or so.

    killed: trackers have what their libraries had written by then, so something is missing there. stopped: they have
    been closed, and steps after the checkpoint run again.
    """
    place = tmp_path_factory.mktemp(request.param)
    tiny.make("llama", place / "llama")
    folder = place / "run"
    env = {
        "PYTHONPATH": f"{launching.environment()['PYTHONPATH']}:{os.environ.get('PYTHONPATH', '')}",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{place}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(place / "trackio"),
        "HF_TOKEN": SECRET,
        "WANDB_API_KEY": SECRET,
    }
    words = [
        f"--model={place / 'llama'}", "--dataset=sample", f"--output_dir={folder}", f"--cache_dir={place / 'cache'}",
        f"--max_steps={STEPS}", f"--save_every={SAVE}", "--eval_every=10", "--global_batch_pairs=4", "--eval_pairs=8",
        "--max_length=96", "--learning_rate=1e-3", "--generations=0", "--loss=sigmoid,sft",
        f"--report_to={','.join(FOUND) or 'none'}",
    ]  # fmt: skip
    if request.param == "killed":
        command = ["-m", "dpo_ds.train", *words]
        launching.kill_after(1, command, folder, STOP, **env)
        said = launching.run(1, *command, **env).stdout
    else:
        scenarios = [{"argv": words, "stop_after": STOP}, {"argv": words, "curves": True}]
        said = launching.run_scenarios(1, scenarios, place / "scenarios.json", **env)
    (folder / "said.txt").write_text(said)
    return folder


def recorded(folder, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in launching.metrics(folder) if name in line}


def require_same(folder, of_tracker, name: str) -> None:
    """of_tracker: the tracker's (step, value) of the metric, in the order in which it has them."""
    expected = recorded(folder, name)
    assert [step for step, _ in of_tracker] == [*expected], name
    for step, value in of_tracker:
        assert value == pytest.approx(expected[step], rel=1e-6), (name, step)


def no_secret(place) -> None:
    files = [file for file in place.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file


def test_metrics_file_and_curves(folder):
    assert [*recorded(folder, "loss")] == [*range(1, STEPS + 1)]
    assert [*recorded(folder, "eval/loss")] == EVALUATIONS
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"from {folder}/checkpoints/step-" in (folder / "said.txt").read_text()


@needs["tensorboard"]
def test_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name, tag in (("loss", "train/loss"), ("loss/sft", "train/loss/sft"), ("eval/loss", "eval/loss")):
        require_same(folder, [(event.step, event.value) for event in events.Scalars(tag)], name)
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| max_steps | 30 |" in text
    no_secret(folder / "tensorboard")


@needs["mlflow"]
def test_mlflow(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder.parent}/mlruns")
    experiment = client.get_experiment_by_name("dpo_ds")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED" and run.data.params["max_steps"] == "30"
    for name, metric in (("loss", "loss"), ("loss/sft", "loss_sft"), ("eval/loss", "eval_loss")):
        history = client.get_metric_history(run.info.run_id, metric)
        require_same(folder, [(point.step, point.value) for point in history], name)
    no_secret(folder.parent / "mlruns")


@needs["trackio"]
def test_trackio(folder, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(folder.parent / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [run] = trackio.Api().runs("dpo_ds")
    assert run.name.startswith("run-") and run.config["max_steps"] == 30
    rows = SQLiteStorage.get_logs("dpo_ds", run.name)
    for name in ("loss", "loss/sft", "eval/loss"):
        ours = name if name.startswith("eval") else f"train/{name}"
        require_same(folder, [(row["step"], row[ours]) for row in rows if ours in row], name)
    no_secret(folder.parent / "trackio")


@needs["wandb"]
def test_wandb(folder):
    from dpo_ds.reports.wandb_files import records as records_of

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one run, in two files"
    records = [record for file in files for record in records_of(file)]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    for name in ("loss", "loss/sft", "eval/loss"):
        ours = name if name.startswith("eval") else f"train/{name}"
        require_same(folder, [(row["train/global_step"], row[ours]) for row in rows if ours in row], name)
    assert [row["_step"] for row in rows] == [*range(STEPS + 1)]
    config = {item.key: json.loads(item.value_json) for r in records for item in r.run.config.update}
    assert config["max_steps"] == 30
    no_secret(folder / "wandb")
