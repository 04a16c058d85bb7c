"""What --model may name in dpo_ds.evaluate, and what it is then compared with."""

import json
from pathlib import Path

import pytest

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.runs.named import named, reference_for

RUN = {"model": "tiny-gpt2", "dataset": "sample", "reference": "precomputed", "beta": 0.2, "an option of old": 1}


def write(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file.parent


def run(place: Path, **changes) -> Path:
    return write(place / "run" / "run.json", {**RUN, **changes})


def checkpoint(place: Path, step: int, **changes) -> Path:
    folder = run(place, **changes) / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state-0.safetensors").touch()
    return write(folder / "checkpoint.json", {"step": step, "ranks": 1, "stage": 0, "options": {**RUN, **changes}})


def adapter(place: Path, name: str, base) -> Path:
    return write(place / name / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})


def reference(policy, **options):
    return reference_for(policy, Options(model="policy", **options))


def test_a_hub_id_is_taken_as_it_is():
    found = named("--model", "openai-community/gpt2")
    assert (found.model, found.short, found.adapter, found.checkpoint) == ("openai-community/gpt2", "gpt2", None, None)
    assert reference(found) is None


def test_a_run_is_its_merged_folder_else_its_newest_checkpoint(tmp_path):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 10)
    found = named("--model", str(tmp_path / "run"))
    assert found.checkpoint == newest and found.model == "tiny-gpt2" and found.short == "run, step 10"
    assert found.run == tmp_path / "run" and found.options.beta == 0.2
    merged = write(tmp_path / "run" / "merged" / "config.json", {})
    for name in (tmp_path / "run", merged):
        found = named("--model", str(name))
        assert (found.model, found.checkpoint, found.short) == (str(merged), None, "run")
        assert found.options.dataset == "sample" and found.run == tmp_path / "run"


def test_an_adapter_is_its_base_and_itself(tmp_path):
    folder = adapter(tmp_path, "sft", "tiny-gpt2")
    found = named("--model", str(folder))
    assert (found.model, found.adapter, found.short) == ("tiny-gpt2", str(folder), "sft")
    against = reference(found)
    assert (against.model, against.adapter) == ("tiny-gpt2", None) and "the adapter's base" in against.what
    assert named("--model", "tiny-gpt2", str(folder)).adapter == str(folder)


def test_a_merged_folder_that_was_moved_names_its_base_in_its_card(tmp_path):
    folder = write(tmp_path / "moved" / "config.json", {})
    write(folder / "README.md", "---\nbase_model: tiny-gpt2\nlibrary_name: transformers\ntags: [dpo, dpo_ds]\n---\n")
    assert reference(named("--model", str(folder))).model == "tiny-gpt2"
    write(folder / "README.md", "---\nbase_model: tiny-gpt2\ntags: [dpo]\n---\n")
    assert reference(named("--model", str(folder))) is None, "nobody but dpo_ds is believed"


@pytest.mark.parametrize(
    ("changes", "model", "adapter_name", "words"),
    [
        ({}, "tiny-gpt2", None, "the run's reference"),
        ({"reference_model": "other/model"}, "other/model", None, "the run's reference"),
        ({"lora": True, "adapter": "sft"}, "tiny-gpt2", "sft", "the run's reference"),
        ({"lora": True, "adapter": "sft", "reference": "base"}, "tiny-gpt2", None, "the run's reference"),
        ({"reference_adapter": "ref"}, "tiny-gpt2", "ref", "the run's reference"),
        ({"reference": "none"}, "tiny-gpt2", None, "what the run began with"),
        ({"reference_table": "table.parquet"}, "tiny-gpt2", None, "what the run began with"),
        ({"reference_update_every": 2}, "tiny-gpt2", None, "as it was before it moved"),
    ],
)
def test_a_runs_reference(changes, model, adapter_name, words, tmp_path):
    found = reference(named("--model", str(checkpoint(tmp_path, 1, **changes))))
    assert (found.model, found.adapter) == (model, adapter_name) and words in found.what


def test_options_decide_over_the_run(tmp_path):
    policy = named("--model", str(checkpoint(tmp_path, 1)))
    assert reference(policy, reference="none") is None
    other = write(tmp_path / "other" / "config.json", {})
    assert reference(policy, reference_model=str(other)).model == str(other)
    found = reference(policy, reference_model="tiny-gpt2", reference_adapter="ref")
    assert (found.model, found.adapter) == ("tiny-gpt2", "ref")
    second = named("--model", "tiny-gpt2")
    assert reference(second, reference_adapter="ref").adapter == "ref"


def refused(name, **options) -> str:
    with pytest.raises(UserError) as error:
        reference(named("--model", str(name)), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals(tmp_path):
    assert "without a complete checkpoint" in refused(run(tmp_path))
    unfinished = tmp_path / "run" / "checkpoints" / "step-000001.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "state-0.safetensors").touch()
    assert "is an unfinished checkpoint: name another" in refused(unfinished)
    whole = checkpoint(tmp_path, 3)
    (whole / "state-0.safetensors").unlink()
    assert "lacks its state-0.safetensors" in refused(whole)
    (whole / "checkpoint.json").write_text("{")
    assert "is damaged" in refused(whole)
    assert "an adapter of /gone/base, which is not there: name its base with --model BASE --adapter" in refused(
        adapter(tmp_path, "lost", "/gone/base")
    )
    assert "does not say of which model" in refused(adapter(tmp_path, "nameless", None))
    write(tmp_path / "torn" / "adapter_config.json", "{")
    assert "is damaged" in refused(tmp_path / "torn")
    assert "holds adapters already" in refused(
        tmp_path, reference_model=str(adapter(tmp_path, "a", "tiny-gpt2")), reference_adapter="b"
    )
    gone = checkpoint(tmp_path / "second", 1, model="/gone/model")
    assert "was trained from /gone/model, which is not there" in refused(gone)
    assert refused_not(gone, reference="none")
    assert "needs its base: add --reference_model" in refused(gone, reference_adapter="ref")


def refused_not(name, **options) -> bool:
    return reference(named("--model", str(name)), **options) is None
