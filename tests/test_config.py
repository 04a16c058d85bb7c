"""Options: flags over YAML, one spelling, errors of one line that help."""

import subprocess
import sys

import pytest

from dpo_ds.config import FIELDS, Options, parse_options, to_yaml
from dpo_ds.errors import UserError


def test_flags_override_yaml_and_later_flags_earlier_ones(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name: a\nbeta: 0.3\nlora: true\nlearning_rate: 1e-6\nmax_steps: null\n")
    options = parse_options(["--config", str(file), "--beta", "0.2", "--beta", "0.5", "--lora", "false"])
    assert (options.model, options.beta, options.lora, options.max_steps) == ("a", 0.5, False, None)
    assert options.learning_rate == 1e-6, "YAML 1.1 reads 1e-6 as text; the option's type decides"


def test_what_is_written_reads_back_equal(tmp_path):
    file = tmp_path / "options.yaml"
    options = parse_options("--model_name m --lora --learning_rate 3e-7 --eval_pairs 0 --truncation keep_start".split())
    file.write_text(to_yaml(options))
    assert parse_options([f"--config={file}"]) == options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model m --lerning_rate 1", "did you mean --learning_rate?"),
        ("--model m --lora_rank 8", "did you mean --lora_r?"),
        ("--model m extra", "unexpected argument extra: options are written --name value"),
        ("--model m --beta abc", "--beta"),
        ("--model m --beta 0", "--beta is 0.0, but must be more than 0"),
        ("--model m --learning_rate nan", "--learning_rate is nan"),
        ("--model m --precision fp8", "'bf16', 'fp32'"),
        ("--model m --reference base", "add --lora"),
        ("--model m --max_length 1", "2 or more"),
        ("--beta 0.1", "--model is needed"),
        ("--model m --config /no/such.yaml", "/no/such.yaml"),
        ("--model", "expected one argument"),
    ],
)
def test_errors_are_one_line_with_the_remedy(flags, words):
    with pytest.raises(UserError) as error:
        parse_options(flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("betta: 1", "did you mean beta?"),
        ("beta: [1, 2]", "single value"),
        ("- 1", "no 'key: value' lines"),
        ("a: b: c", "is not YAML"),
        ("beta: high", "--beta"),
    ],
)
def test_errors_in_yaml_too(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_options(["--model", "m", "--config", str(file)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_launchers_local_rank_is_taken():
    assert parse_options(["--local_rank=1", "--model", "m"]).model == "m"


def test_help_explains_every_option_with_its_default():
    out = subprocess.run(
        [sys.executable, "-m", "dpo_ds.train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    flat = " ".join(out.split())
    for name in FIELDS:
        assert f"--{name}" in flat
    assert "default: 0.1" in flat and "--model_name" in flat


def test_options_have_help():
    assert all(field.metadata.get("help") for field in FIELDS.values())
    assert Options().model is None
