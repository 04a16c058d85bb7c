"""Nothing from a file runs, no secret is written, and what is exported names no place on this machine."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest

from dpo_ds.config import parse_options
from dpo_ds.engine.check_config import check_file
from dpo_ds.errors import UserError
from dpo_ds.export import model_card
from dpo_ds.reports.trackers import without_secrets
from dpo_ds.secrets import public_names

PACKAGE = launching.ROOT / "dpo_ds"
TOKEN = "hf_" + "aB3dE5gH7j" * 4

# ------------------------------------------------------------------------------------------------------- the sources


def unsafe(source: str) -> list[str]:
    """The calls of a source file that could run code that comes with a file, or build a command from text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        last = called.split(".")[-1]
        wrong = (
            (called == "torch.load" and given.get("weights_only") != "True")
            or (last == "load" and given.get("allow_pickle", "False") != "False")
            or (called == "yaml.load" and given.get("Loader") != "_OneOfEach")
            or re.fullmatch(
                r"(yaml\.(full_|unsafe_)load|(c?[pP]ickle|dill|marshal|shelve|joblib)\.(loads?|open))", called
            )
            or called in ("eval", "exec", "os.system", "os.popen")
            or given.get("shell", "False") != "False"
            or given.get("trust_remote_code") == "True"
            or (last == "from_pretrained" and "use_safetensors" not in given and loads_weights(called))
        )
        if wrong:
            found.append(ast.unparse(node))
    return found


def loads_weights(called: str) -> bool:
    return not re.match(r"(AutoConfig|GenerationConfig|\w*Tokenizer\w*)\.", called)


# What is unsafe by its look alone, with the reason why it is not.
SAFE = {
    "pickle.loads(pickle.dumps(error))": "ranks/process.py: an error of this process, to see whether it can be sent",
    "PeftModel.from_pretrained(model, adapter)": "reports/answers.py: find_adapter wants safetensors",
    "architecture.from_pretrained(None, ": "models/headers.py: no file is read; the tensors are given",
}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_source_file_unpickles_or_runs_what_it_reads(file):
    left = [call for call in unsafe(file.read_text(encoding="utf-8")) if not call.startswith(tuple(SAFE))]
    assert not left


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)", "pickle.load(file)", "eval(text)",
        "subprocess.run(text, shell=True)", "os.system(text)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)", "AutoModelForCausalLM.from_pretrained(folder)",
    ],
)  # fmt: skip
def test_the_scan_finds_what_is_unsafe(source):
    assert unsafe(source) == [source.replace('"', "'")]


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", TOKEN],
        [f"--dataset=https://me:{TOKEN}@host/pairs.jsonl"],
        ["--dataset", f"https://host/pairs.jsonl?token={TOKEN}"],
        [f"--hub_token={TOKEN}"],
        [TOKEN],
        ["--chat_template_kwargs", f'{{"key": "sk-{"a1B2" * 10}"}}'],
    ],
)
def test_a_secret_among_the_options_is_refused_and_not_repeated(argv):
    with pytest.raises(UserError, match="holds a token or a password") as error:
        parse_options(["--model", "gpt2", *argv])
    assert "aB3dE5" not in str(error.value) and "a1B2" not in str(error.value)


def test_a_secret_in_a_file_of_options_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: gpt2\ndataset: https://me:{TOKEN}@host/x.jsonl\n")
    with pytest.raises(UserError, match="--dataset holds a token or a password") as error:
        parse_options(["--config", str(tmp_path / "run.yaml")])
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "name", ["/data/hf_models_converted_for_llama3", "hf-internal/testing", "sk_pairs.jsonl", "a@b:0.5"]
)
def test_what_only_looks_like_a_secret_is_taken(name):
    assert parse_options(["--model", name]).model == name


@pytest.mark.parametrize("value", ["c0met-s3cret", 5, ["c0met-s3cret"]])
def test_a_key_in_a_deepspeed_config_is_refused_and_not_repeated(value):
    with pytest.raises(UserError, match=r"comet\.api_key cannot be used: DeepSpeed writes its config") as error:
        check_file("x.json", {"comet": {"enabled": False, "api_key": value}})
    assert "s3cret" not in str(error.value)


def test_trackers_get_no_secret():
    options = parse_options(["--model", "m"]).replace(dataset=f"https://me:{TOKEN}@host/x?token={TOKEN}")
    assert TOKEN not in str(without_secrets(options))


# ----------------------------------------------------------------------------------------------------- the model card


def card(tmp_path, *more: str) -> str:
    model = tmp_path / "secret-client" / "llama"
    model.mkdir(parents=True, exist_ok=True)
    (tmp_path / "pairs.jsonl").write_text("")
    options = parse_options([
        f"--model={model}", f"--dataset={tmp_path}/pairs.jsonl:0.5,a/b:0.5", f"--output_dir={tmp_path}/run",
        f"--cache_dir={tmp_path}/cache", f"--ds_config={tmp_path}/ds.json", f"--nvme_path={tmp_path}/nvme",
        f"--eval_dataset={tmp_path}/*.jsonl", f"--reference_model={model}", *more,
    ])  # fmt: skip
    return model_card(options, {"loss": 0.5}, "d1", stage=2)


def test_the_card_names_no_place_on_this_machine(tmp_path):
    text = card(tmp_path)
    assert str(tmp_path) not in text and "secret-client" not in text and str(Path.home()) not in text
    assert "base_model: llama\n" in text and "| dataset | pairs.jsonl:0.5,a/b:0.5 |" in text
    assert "| ds_config | ds.json |" in text and "| loss | 0.5 |" in text
    assert not re.search(r"\| (output_dir|cache_dir|nvme_path) \|", text)


def test_the_card_says_that_code_was_trusted(tmp_path):
    assert "It was trained with `--trust_remote_code`: loading it runs" in card(tmp_path, "--trust_remote_code")
    assert "loading it runs" not in card(tmp_path)


def test_hub_ids_stay_and_paths_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert public_names("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    assert public_names("~/models/x") == "x" and public_names("./here") == "here" and public_names(".") == tmp_path.name
    assert public_names("/gone/long/since.jsonl:0.25,sample:0.75") == "since.jsonl:0.25,sample:0.75"


# -------------------------------------------------------------------------------------------------- the launch scripts

SCRIPTS = sorted((launching.ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_script_uses_a_variable_unquoted_or_runs_text(script):
    """What stands between quotes is taken out, and assignments, which do not split words. The rest may hold no $."""
    for line in script.read_text().splitlines():
        code = re.sub(r"(^|\s)#.*", "", line)
        assert not re.search(r"\beval\b|\bsh -c\b|`", code), line
        bare = re.sub(r"'[^']*'", "", re.sub(r'"(\\.|\$\([^()]*\)|[^"\\])*"', "", code))
        bare = re.sub(r"(?<![\w])[A-Z_a-z]+=\S*", "", bare)
        assert not re.search(r"\$[\w{@*]", bare), line


@pytest.mark.launch
def test_scripts_take_a_folder_and_arguments_as_they_are(tmp_path):
    """quickstart.sh, in a folder with spaces and $( ) in its name, and with such an option."""
    place = tmp_path / "a b $(touch pwned) `touch pwned`"
    shutil.copytree(launching.ROOT / "launch", place / "launch")
    for file in ("constraints.txt", "setup.py"):
        shutil.copy(launching.ROOT / file, place / file)
    made = place / ".venv"
    made.mkdir()
    for name in ("bin", "lib"):
        (made / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", made / "pyvenv.cfg")
    both = (place / "constraints.txt").read_bytes() + (place / "setup.py").read_bytes()
    stamp = subprocess.run(["sha256sum"], input=both, capture_output=True, check=True).stdout[:16].decode()
    (made / f"installed-{stamp}").touch()
    option = "--model=/no/$(touch pwned); touch pwned"
    done = launching.execute(
        ["bash", str(place / "launch" / "quickstart.sh"), option],
        check=False,
        cwd=tmp_path,
        env=launching.environment(),
    )
    assert done.returncode == 2, done.stdout[-3000:]
    assert f"--model {option.removeprefix('--model=')} is not there: check the path" in done.stdout
    assert not list(tmp_path.rglob("pwned"))
