"""Options: flags override YAML, each has one spelling, and an error is one line with the remedy."""

import os
import re
import subprocess
import sys
import typing

import pytest

from dpo_ds.config import (
    ALIASES,
    FIELDS,
    Options,
    group_of,
    help_of,
    parse_options,
    read_columns,
    template_variables,
    to_yaml,
    with_checksum,
)
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
        ("--model m --precision fp8", "argument --precision: invalid choice: 'fp8'"),
        ("--model m --reference base", "add --lora"),
        ("--model m --max_length 1", "2 or more"),
        ("--model m --min_prompt_tokens 0", "--min_prompt_tokens is 0, but must be more than 0"),
        ("--model m --min_prompt_tokens 64 --max_length 64", "is 64, but must be less than --max_length, 64"),
        ("--model m --min_prompt_tokens 9 --truncation keep_end", "is for --truncation keep_question"),
        ("--model m --chat_template_kwargs thinking", "is thinking, but must be a JSON object"),
        ("--model m --chat_template_kwargs [1]", "is [1], but must be a JSON object"),
        ("--beta 0.1", "--model is needed"),
        ("--model m --config /no/such.yaml", "/no/such.yaml"),
        ("--model m --min_margin 2", "--min_margin is for --pairs above_margin"),
        ("--model m --pairs above_margin --min_margin -1", "--min_margin is -1.0, but must be 0 or more"),
        ("--model m --pairs best", "argument --pairs: invalid choice: 'best'"),
        ("--model m --columns prompt", "--columns prompt: write name=column, as in prompt=question,chosen=best"),
        ("--model m --columns prompt=", "write name=column"),
        ("--model m --columns =a", "write name=column"),
        ("--model m --columns prompt=a,,chosen=b", "write name=column"),
        ("--model m --columns promt=a", "--columns has no name promt; did you mean prompt? It takes prompt, messages"),
        ("--model m --columns prompt=a,prompt=b", "--columns names prompt twice: a and b"),
        ("--model m --reference_update_every 5", "--reference auto has none: add --reference live"),
        ("--model m --reference live --reference_update_every 0", "but must be more than 0"),
        ("--model m --reference live --reference_update_alpha 1", "is for --reference_update_every: add that"),
        (
            "--model m --reference live --reference_update_every 5 --reference_update_alpha 1.5",
            "but must be above 0 and at most 1",
        ),
        ("--model m --reference live --reference_update_every 5 --lora", "--lora trains adapters: train all weights"),
        ("--model m --reference live --reference_update_every 5 --reference_model b", "leave out --reference_model"),
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


def test_the_templates_variables_are_a_json_object():
    options = parse_options(["--model", "m", "--chat_template_kwargs", '{"enable_thinking": false}'])
    assert template_variables(options) == {"enable_thinking": False}
    assert template_variables(parse_options(["--model", "m"])) == {}


def test_columns_are_read():
    options = parse_options(["--model", "m", "--columns", "prompt = my question, chosen=a=b"])
    assert read_columns(options.columns) == {"prompt": "my question", "chosen": "a=b"} and read_columns(None) == {}


def test_launchers_local_rank_is_taken():
    assert parse_options(["--local_rank=1", "--model", "m"]).model == "m"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        *((flags, True) for flags in ("--lora", "--lora true", "--lora=YES", "--lora 1")),
        *((flags, False) for flags in ("", "--lora=false", "--lora no", "--lora 0", "--lora --lora f")),
    ],
)
def test_true_and_false_are_written_in_many_ways(flags, value):
    assert parse_options(["--model", "m", *flags.split()]).lora is value


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lora=maybe", "argument --lora: 'maybe' is neither true nor false"),
        ("--seed=1.5", "argument --seed: invalid int value: '1.5'"),
        ("--gpus=few", "argument --gpus: invalid int value: 'few'"),
        ("--epochs=all", "argument --epochs: invalid float value: 'all'"),
        ("--nvme=none", "argument --nvme: invalid float value: 'none'"),
        ("--plan=maybe", "argument --plan: invalid choice: 'maybe'"),
        ("--router_aux_loss_coef=a\nb", "--router_aux_loss_coef is a b, but must be"),
        ("--a\nb", "unknown option --a b"),
    ],
    ids=lambda text: repr(text)[1:-1],
)
def test_a_wrong_value_of_each_type_is_one_line(flag, words):
    with pytest.raises(UserError) as error:
        parse_options(["--model", "m", flag])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in FIELDS if "_" in name])
def test_dashes_are_refused_with_the_right_spelling(name):
    dashed = name.replace("_", "-")
    with pytest.raises(UserError, match=rf"unknown option --{dashed}; did you mean --{name}\?"):
        parse_options(["--model", "m", f"--{dashed}", "1"])


def of_type(value, hint) -> bool:
    """Whether the value is exactly of the annotated type: True is not an int here, and 1 not a float."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) or [hint]
    return any(of_type(value, kind) if typing.get_origin(kind) else type(value) is kind for kind in kinds)


@pytest.mark.parametrize("name", FIELDS)
def test_defaults_have_the_types_of_their_fields(name):
    assert of_type(FIELDS[name].default, typing.get_type_hints(Options)[name])


@pytest.mark.parametrize("name", FIELDS)
def test_a_given_value_has_the_type_of_its_field(name):
    hint = typing.get_type_hints(Options)[name]
    kinds = [kind for kind in typing.get_args(hint) or [hint] if kind is not type(None)]
    # "1" can be read as a str, an int, a float and a bool.
    text = "1"
    if typing.get_origin(hint) is typing.Literal:
        text = kinds[-1]
    elif typing.get_origin(kinds[0]) is typing.Literal:
        text = typing.get_args(kinds[0])[-1]
    flags = [f"--{name}={text}"]
    if name == "max_length":
        flags = ["--max_length=2"]
    elif name == "pair_tokens":
        flags = ["--pair_tokens=3"]
    elif flags == ["--reference=base"]:
        flags.append("--lora")
    elif name.startswith("reference_update"):
        flags = ["--reference=live", "--reference_update_every=1", *flags]
    elif name == "chat_template_kwargs":
        flags = ["--chat_template_kwargs={}"]
    elif name == "lora_dropout":
        flags = ["--lora_dropout=0"]
    elif name == "columns":
        flags = ["--columns=prompt=question"]
    elif name == "report_to":
        flags = ["--report_to=wandb"]
    elif name == "min_margin":
        flags.append("--pairs=above_margin")
    value = getattr(parse_options(["--model", "m", *flags]), name)
    assert value is not None and of_type(value, hint)


def test_help_shows_every_option_once_under_its_heading():
    out = subprocess.run(
        [sys.executable, "-m", "dpo_ds.train", "--help"],
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = []
    for line in out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        elif line.startswith("  --"):
            flags = line.strip().split("  ")[0]  # the help follows after two spaces, or on the next line
            found.append((heading, re.findall(r"--[\w-]+", flags)))
    found.remove(("options", ["--config"]))
    aliases = {name: [alias for alias in ALIASES if ALIASES[alias] == name] for name in FIELDS}
    assert found == [(group_of(name), ["--" + word for word in [name, *aliases[name]]]) for name in FIELDS]
    assert not re.search(r"--[a-z]+-", out), "no spellings with dashes"
    flat = " ".join(out.split())
    for name, field in FIELDS.items():
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        assert help_of(name) + default in flat


def test_groups():
    assert list(dict.fromkeys(map(group_of, FIELDS))) == [
        "what to train",
        "the machine",
        "whether it fits",
        "the loss",
        "the optimisation",
        "the data",
        "LoRA",
        "evaluation, checkpoints, export",
    ]
    first = ("model", "ds_config", "plan", "beta", "learning_rate", "max_length", "lora", "eval_every")
    last = ("trust_remote_code", "micro_batch_tokens", "nvme_path", "reference", "seed", "max_left_out")
    assert [group_of(name) for name in first] == list(dict.fromkeys(map(group_of, FIELDS)))
    assert [group_of(name) for name in (*last, "lora_targets", "generations")] == [group_of(name) for name in first]


def test_options_are_read_without_transformers_and_torch():
    seen = "import sys, dpo_ds.config; print({'transformers', 'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def changed_by(text: str, harm: str) -> str:
    return {
        "flipped": text.replace("seed: 42", "seed: 43"),
        "cut": text[: len(text) // 2],
        "cut at a line": "\n".join(text.splitlines()[:-5]) + "\n",
        "only its first line": text.splitlines()[0] + "\n",
    }[harm]


@pytest.mark.parametrize("harm", ["flipped", "cut", "cut at a line", "only its first line"])
def test_a_runs_options_that_were_damaged_are_refused(harm, tmp_path):
    file = tmp_path / "options.yaml"
    text = with_checksum(to_yaml(Options(model="x", beta=0.2)))
    file.write_text(text)
    assert parse_options(["--config", str(file)]) == Options(model="x", beta=0.2)
    file.write_text(changed_by(text, harm))
    with pytest.raises(UserError, match="is not as a run wrote it: if you changed it, take its first line away"):
        parse_options(["--config", str(file)])


def test_a_runs_options_may_be_changed_without_their_first_line(tmp_path):
    text = changed_by(with_checksum(to_yaml(Options(model="x"))), "flipped")
    (tmp_path / "mine.yaml").write_text(text.partition("\n")[2])
    assert parse_options(["--config", str(tmp_path / "mine.yaml")]).seed == 43
