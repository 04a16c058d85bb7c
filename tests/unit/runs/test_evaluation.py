"""dpo_ds.evaluate before a weight is read: which options it takes from a run, and the mistakes that it reports."""

import gzip
import json
import shutil
from pathlib import Path

import adapters
import pytest
import tiny

from dpo_ds.config import Options, given
from dpo_ds.embedded import sample_file
from dpo_ds.errors import UserError
from dpo_ds.evaluate import main
from dpo_ds.runs.evaluation import beta_of, like_its_run
from dpo_ds.runs.named import Named


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluation")
    tiny.make("llama", place / "llama")
    tiny.make("gpt2", place / "gpt2")
    tiny.make("Qwen/Qwen2-7B-Instruct", place / "qwen")
    adapters.make(place / "llama", place / "sft")
    with gzip.open(sample_file(), "rt") as file:
        (place / "pairs.jsonl").write_text("".join(next(file) for _ in range(12)))
    shutil.copytree(place / "llama", place / "empty")
    (place / "empty" / "model.safetensors").unlink()
    other = json.loads((place / "sft" / "adapter_config.json").read_text())
    shutil.copytree(place / "sft", place / "strange")
    (place / "strange" / "adapter_config.json").write_text(
        json.dumps({**other, "base_model_name_or_path": str(place / "gpt2")})
    )
    return place


CASES = {
    "no pairs named": ({"dataset": None}, "--dataset is needed: name the pairs on which --model"),
    "no such data": ({"dataset": "./none.jsonl"}, "--dataset ./none.jsonl"),
    "data for training": ({"eval_dataset": "sample"}, "--eval_dataset is for training"),
    "no such model": ({"model": "./nowhere"}, "--model ./nowhere is not there"),
    "no such reference": ({"reference_model": "./nowhere"}, "--reference_model ./nowhere is not there"),
    "other token ids": ({"reference_model": "qwen"}, "has other token ids"),
    "no weights": ({"model": "empty"}, "holds no safetensors weights"),
    "no weights of the reference": ({"reference_model": "empty"}, "holds no safetensors weights"),
    "an adapter of another base": ({"model": "strange"}, "it is of another base"),
    "a longer length than the context": ({"max_length": 4096}, "above the model's context of 512"),
    "a micro-batch that is too small": ({"micro_batch_tokens": 9}, "--micro_batch_tokens 9 cannot hold"),
    "a temperature of 0": ({"temperature": 0}, "--temperature is 0.0, but must be more than 0"),
    "a share above 1": ({"top_p": 1.5}, "--top_p is 1.5"),
    "answers of no tokens": ({"answer_tokens": 0}, "--generations 0 shows none"),
    "a misspelt option": ({"tempreature": 1}, "did you mean"),
    "a folder of something else": ({"output_dir": "llama"}, "holds files of something else"),
    "a file for a folder": ({"output_dir": "pairs.jsonl"}, "is a file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_with_the_remedy(case, place, tmp_path, monkeypatch):
    changes, words = CASES[case]
    monkeypatch.chdir(place)
    options = {"model": "llama", "dataset": "pairs.jsonl", "output_dir": tmp_path / "out", "cache_dir": place / "cache",
               "max_length": 96, "precision": "fp32", **changes}  # fmt: skip
    with pytest.raises(UserError) as error:
        main([f"--{name}={value}" for name, value in options.items() if value is not None])
    assert words in str(error.value) and "\n" not in str(error.value), error.value
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    words = "--model=meta-llama/Meta-Llama-3-70B-Instruct --dataset=sample --gpus=1 --gpu_memory=80 --host_memory=90"
    with pytest.raises(UserError, match=r"does not fit 1 GPU\(s\) of 80.0 GiB"):
        main([*words.split(), "--plan=only"])


def policy(**options) -> Named:
    return Named("--model", "a run", "run", "tiny-gpt2", options=Options(model="tiny-gpt2", **options))


RUN = {"dataset": "sample", "max_length": 96, "truncation": "keep_end", "precision": "fp32", "eval_pairs": 20,
       "learning_rate": 1.0}  # fmt: skip


def test_a_run_decides_how_pairs_become_tokens():
    argv = ["--model=x", "--dataset=a.jsonl", "--truncation", "keep_start"]
    options = like_its_run(policy(**RUN), Options(dataset="a.jsonl", truncation="keep_start", model="x"), given(argv))
    assert (options.max_length, options.truncation, options.precision) == (96, "keep_start", "fp32")
    assert options.dataset == "a.jsonl" and options.eval_pairs is None and options.learning_rate is None


def test_without_a_dataset_a_run_decides_which_pairs():
    options = like_its_run(policy(**RUN), Options(model="x"), given(["--model=x", "--max_length=64"]))
    assert (options.dataset, options.eval_pairs, options.max_length) == ("sample", 20, None)


def test_given_reads_flags_aliases_and_a_config(tmp_path):
    Path(tmp_path / "run.yaml").write_text("max_length: 9\n")
    words = ["--model_name", "x", "--lora", "--config", str(tmp_path / "run.yaml"), "--seed=1"]
    assert given(words) == {"model", "lora", "config", "max_length", "seed"}


@pytest.mark.parametrize(
    ("run", "asked", "beta"),
    [
        ({}, None, 0.1),
        ({"beta": 0.3}, None, 0.3),
        ({"beta": 0.3}, 0.5, 0.5),
        ({"loss": "sft,ipo", "beta": 0.2}, None, 0.2),
        ({"loss": "simpo", "beta": 2.0}, None, 0.1),
    ],
)
def test_beta_is_the_runs(run, asked, beta):
    assert beta_of(policy(**run), Options(model="x", beta=asked)) == beta
    assert beta_of(Named("--model", "a", "a", "a"), Options(model="a")) == 0.1


def test_code_of_a_runs_model_is_not_run_unasked():
    with pytest.raises(UserError, match="add --trust_remote_code"):
        like_its_run(policy(trust_remote_code=True), Options(model="x"), {"model"})
