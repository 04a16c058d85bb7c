"""Reference tables are computed once, completed after a kill, and computed again if they are damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import launching
import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dpo_ds.checksums import sealed
from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.engine import join
from dpo_ds.engine.build import policy_engine
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import RunStopped, UserError
from dpo_ds.losses.table import losses_of
from dpo_ds.ranks import world
from dpo_ds.references import table as tables_file
from dpo_ds.references.kinds import Precomputed, reference_of
from dpo_ds.references.table import Table, reference_tables
from dpo_ds.runs.prepare import Run, prepare
from dpo_ds.runs.table_file import TableFile, _digest
from dpo_ds.score import main
from dpo_ds.scoring import sweep
from dpo_ds.scoring.sweep import score_answers, score_set

PAIRS, HELD_OUT, CHUNK = 22, 6, 8  # a chunk is of answers: four pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("score")
    tiny.make("llama", place / "llama")
    words = np.random.default_rng(0).choice(["kind", "unkind", "deed", "cat", "the"], (PAIRS, 3, 30))
    with open(place / "pairs.jsonl", "w") as file:
        for n, (prompt, chosen, rejected) in enumerate(words):
            texts = [" ".join(part[: 3 + (n * k) % 23]) for k, part in ((5, prompt), (7, chosen), (11, rejected))]
            file.write(json.dumps({"prompt": f"{n} {texts[0]}", "chosen": " " + texts[1], "rejected": f" {texts[2]}!"}))
            file.write("\n")
    join.join()
    return place


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sweep, "CHUNK", CHUNK)


@pytest.fixture
def scored(monkeypatch):
    """A list of the answers in each micro-batch that engines have scored."""
    plain, batches = Engine.score, []

    def counting(self, batch):
        batches.append(batch.answers)
        return plain(self, batch)

    monkeypatch.setattr(Engine, "score", counting)
    return batches


def argv(place, cache, **options) -> list[str]:
    words = {
        "model": place / "llama", "dataset": place / "pairs.jsonl", "cache_dir": cache, "precision": "fp32",
        "output_dir": cache / "run", "eval_pairs": HELD_OUT, "max_length": 64, "micro_batch_tokens": 250,
        "global_batch_pairs": 4, **options,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in words.items()]


def prepared(place, cache, **options) -> Run:
    return prepare(parse_options(argv(place, cache, **options)), world.from_environment())


def tables(place, cache, everything=True, **options) -> list[np.ndarray]:
    return reference_tables(prepared(place, cache, **options), everything)


def files(cache) -> dict[int, bytes]:
    """{rows of a table: its file's content}"""
    return {len(np.load(path)): path.read_bytes() for path in cache.glob("reference/*/logps.npy")}


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    """The cache and the tables of a scoring without interruption."""
    cache = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CHUNK", CHUNK)
        return cache, tables(place, cache)


def test_a_table_holds_what_the_model_says_of_each_pair(place, straight):
    model = oracle.load(place / "llama")
    run = prepared(place, straight[0])
    for pairs, table in zip((run.train_pairs, run.eval_pairs), straight[1], strict=True):
        assert table.shape == (2 * len(pairs),) and table.dtype == np.float32
        with torch.no_grad():
            expected = oracle.pairs_logps(model, [pairs.pair(i) for i in range(len(pairs))])
        np.testing.assert_allclose(table[pairs.pairs], expected.numpy(), rtol=1e-5)


def test_the_second_run_finds_the_table(place, straight, scored, monkeypatch, capsys):
    cache, first = straight
    monkeypatch.setattr(tables_file, "reference_engine", None)
    before = files(cache)
    again = tables(place, cache)
    assert scored == [] and files(cache) == before
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert "reference: training pairs: all 32 answers found in the table" in capsys.readouterr().out


def test_the_command_fills_the_same_table_whatever_the_schedule(place, straight, scored, tmp_path):
    main(argv(place, tmp_path, max_steps=1))
    assert sum(scored) == 2 * PAIRS and files(tmp_path) == files(straight[0])


def test_a_run_scores_what_its_schedule_comes_to_and_a_later_one_the_rest(place, scored, tmp_path):
    train, held = tables(place, tmp_path, everything=False, max_steps=2)
    assert sum(scored) == 2 * (8 + HELD_OUT) and not np.isnan(held).any()
    assert np.isfinite(train).sum() == 2 * 8
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("reference/*/table.json")]
    assert sorted((one["rows"], one["scored"]) for one in manifests) == [(2 * HELD_OUT, 2 * HELD_OUT), (32, 16)]
    scored.clear()
    shutil.rmtree(tmp_path / "run")
    later, _ = tables(place, tmp_path, everything=False, max_steps=4)
    assert sum(scored) == 2 * 8 and np.isfinite(later).all()
    assert np.array_equal(later[np.isfinite(train)], train[np.isfinite(train)])


class Stop(Exception):
    """Ends a scoring."""


def interrupt(run: Run, scored: list[int], batches: int) -> None:
    """Scores `batches` more micro-batches, and stops."""
    plain, most = Engine.score, len(scored) + batches

    def interrupted(self, batch):
        if len(scored) == most:
            raise Stop
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Engine, "score", interrupted)
        reference_tables(run, True)


@pytest.mark.parametrize("batches", [1, 4, 7, 9])
def test_an_interrupted_scoring_goes_on_to_the_same_table(batches, place, straight, scored, tmp_path):
    """Complete chunks are not scored again. The table is that of `straight`, bit for bit."""
    run = prepared(place, tmp_path)
    interrupt(run, scored, batches)
    kept = sum(np.isfinite(np.load(path)).sum() for path in tmp_path.glob("reference/*/logps.npy"))
    assert kept == sum(scored) // CHUNK * CHUNK
    scored.clear()
    reference_tables(run, True)
    assert sum(scored) == 2 * PAIRS - kept and files(tmp_path) == files(straight[0])


def test_an_interruption_while_rows_are_added_loses_none_that_were_there(place, scored, tmp_path):
    first, _ = tables(place, tmp_path, everything=False, max_steps=2)
    run = prepared(place, tmp_path, max_steps=2)
    scored.clear()
    interrupt(run, scored, 2)
    left = 2 * (PAIRS - HELD_OUT - 8) - sum(scored) // CHUNK * CHUNK
    scored.clear()
    train, _ = reference_tables(run, True)
    there = np.isfinite(first)
    assert 0 < left == sum(scored) and np.array_equal(train[there], first[there])


KILLED = """
import os, signal, sys
from dpo_ds import score
from dpo_ds.engine.build import policy_engine
from dpo_ds.engine.engine import Engine
from dpo_ds.scoring import sweep

plain, batches = Engine.score, []

def killed(self, batch):
    batches.append(batch)
    if len(batches) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch)

Engine.score = killed
sweep.CHUNK = int(sys.argv[1])
score.main(sys.argv[2:])
"""


@pytest.mark.launch
def test_a_killed_scoring_goes_on_to_the_same_table(place, straight, scored, tmp_path):
    words = argv(place, tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(CHUNK), *words], env=launching.environment(), capture_output=True, text=True,
        timeout=launching.HANGS,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not list(tmp_path.glob("reference/*/table.json")), "the table was not finished"
    main(words)
    assert CHUNK <= 2 * PAIRS - sum(scored) <= 32, "complete chunks are kept, but not the one that was interrupted"
    assert files(tmp_path) == files(straight[0])


# ------------------------------------------------------------------------------------------------------------- the key


def keys(place, cache, **options) -> set[str]:
    """The tables' keys. A stand-in replaces the engine, because only the keys matter."""

    class Engine:
        score = staticmethod(lambda batch: torch.zeros(batch.answers))
        close = staticmethod(lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_file, "reference_engine", lambda *_: Engine)
        tables(place, cache, **options)
    found = {path.parent.name for path in cache.glob("reference/*/table.json")}
    shutil.rmtree(cache)
    return found


def copied(place, to, name=None, change=None):
    shutil.copytree(place / "llama", to)
    if name:
        change(to / name)
    return to


def one_weight(path):
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def one_number(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))


def swapped_tokens(path):
    """Two tokens exchange their numbers."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer))


def with_template(path):
    path.write_text("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")


def long_rope(path):
    """Frequencies that depend on --max_length. Its value alone then makes another table."""
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(config))


# What changes: a file of the model's folder, and how; or options.
OTHER_KEYS = {
    "weights": ("model.safetensors", one_weight),
    "config": ("config.json", one_number),
    "tokenizer": ("tokenizer.json", swapped_tokens),
    "template": ("chat_template.jinja", with_template),
    "max_length": dict(max_length=20),
    "truncation": dict(truncation="keep_end"),
    "precision": dict(precision="bf16"),
}
SAME_KEY = {
    "rate": dict(learning_rate=1),
    "batch": dict(global_batch_pairs=2, micro_batch_tokens=500, epochs=2),
    "seed": dict(seed=3),
    "loss": dict(loss="hinge", beta=0.5),
    "reference": dict(reference_model="{place}/llama"),
    "lora": dict(lora="true", lora_r=2),
}


@pytest.fixture
def model(place, tmp_path):
    return shutil.copytree(place / "llama", tmp_path / "model")


@pytest.mark.parametrize("what", OTHER_KEYS)
def test_another_key(what, place, model, tmp_path):
    changed = OTHER_KEYS[what]
    given = {"model": model, **(dict(max_length=24) if what == "truncation" else {})}
    first = keys(place, tmp_path / "cache", **given)
    if isinstance(changed, dict):
        given |= changed
    else:
        file, change = changed
        change(model / file)
    assert len(first) == 2 and not first & keys(place, tmp_path / "cache", **given)


def test_the_same_key(place, model, tmp_path):
    """Whatever does not change the reference's values: one table serves all these runs, in any folder of the model."""
    first = keys(place, tmp_path / "cache")
    assert first == keys(place, tmp_path / "cache", model=model)
    for what, options in SAME_KEY.items():
        given = {name: str(value).format(place=place) for name, value in options.items()}
        assert first == keys(place, tmp_path / "cache", **given), what
    whole = [keys(place, tmp_path / "cache", max_length=n, micro_batch_tokens=900) for n in (300, 310)]
    assert whole[0] == whole[1], "neither cuts anything"


def test_another_reference_has_another_key(place, model, tmp_path):
    first = keys(place, tmp_path / "cache")
    one_weight(model / "model.safetensors")
    assert not first & keys(place, tmp_path / "cache", reference_model=model)


def test_the_key_names_max_length_where_frequencies_depend_on_it(place, model, tmp_path):
    long_rope(model / "config.json")
    first = keys(place, tmp_path / "cache", model=model)
    assert not first & keys(place, tmp_path / "cache", model=model, max_length=60)


# ----------------------------------------------------------------------------------------------- weights that changed


REFERENCES = {"precomputed": {}, "live": {}, "base": {"lora": "true"}, "none": {"loss": "simpo"}}


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_run_whose_weights_changed_is_not_continued(reference, place, model, tmp_path):
    given = dict(model=model, reference=reference, **REFERENCES[reference])
    prepared(place, tmp_path / "cache", **given)
    prepared(place, tmp_path / "cache", **given)
    before = model / "model.safetensors"
    time = before.stat().st_mtime_ns
    one_weight(before)
    os.utime(before, ns=(time, time))  # as a program sets it that copies a file with its time
    with pytest.raises(UserError) as refused:
        prepared(place, tmp_path / "cache", **given)
    assert str(refused.value) == (
        f"--output_dir {tmp_path}/cache/run holds a run that began with other files of --model: model.safetensors "
        "changed since, so it would go on from one model and compare with another: put the old files back, or name "
        "another folder to begin again"
    )


def test_a_run_whose_other_reference_changed_is_not_continued(place, model, tmp_path):
    prepared(place, tmp_path / "cache", reference_model=model)
    one_weight(model / "model.safetensors")
    with pytest.raises(UserError, match=r"began with other files of --reference_model: model\.safetensors changed"):
        prepared(place, tmp_path / "cache", reference_model=model)


# ------------------------------------------------------------------------------------------------- the table as a file


@pytest.fixture(scope="module")
def parquet(place, tmp_path_factory):
    """The table of `straight`, as dpo_ds.score writes it."""
    cache = tmp_path_factory.mktemp("parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CHUNK", CHUNK)
        main([*argv(place, cache), f"--output={cache / 'table.parquet'}"])
    return cache / "table.parquet"


def with_file(place, tmp_path, file, **options) -> Run:
    return prepared(place, tmp_path / "cache", reference_table=file, **options)


def test_a_file_has_the_tables_values_to_the_bit(place, straight, parquet, tmp_path):
    run = with_file(place, tmp_path, parquet)
    assert np.array_equal(run.table.training, straight[1][0]) and np.array_equal(run.table.held_out, straight[1][1])
    reference = reference_of(run)
    assert isinstance(reference, Precomputed) and reference.training is run.table.training
    assert run.starts_equal, "the file was made with the policy's own weights"


def test_the_policy_scores_what_it_starts_as(place, straight, scored, monkeypatch, tmp_path):
    """No second engine reads the weights. Another reference has an engine of its own, before the policy comes."""
    monkeypatch.setattr(sweep, "CHUNK", CHUNK)
    run = prepared(place, tmp_path / "cache")
    reference = reference_of(run)
    assert not scored
    policy = policy_engine(run.weights, run.ds_config, run.options, run.attention, run.schedule.steps)
    reference.attach(policy)
    reference.begin()
    policy.close()
    assert scored and np.array_equal(reference.known(), straight[1][0])
    assert np.array_equal(reference.held_out_logps(), straight[1][1])
    shutil.copytree(place / "llama", tmp_path / "other")
    one_weight(tmp_path / "other" / "model.safetensors")
    scored.clear()
    other = reference_of(prepared(place, tmp_path / "again", reference_model=tmp_path / "other"))
    assert scored and not np.array_equal(other.known(), straight[1][0])


def test_a_file_says_what_is_in_it(place, straight, parquet):
    table = pq.read_table(parquet)
    facts = json.loads(table.schema.metadata[b"dpo_ds"])
    assert facts["model"] == str(place / "llama") and facts["precision"] == "fp32"
    assert set(facts["weights"]) == {"config.json", "model.safetensors"}
    assert table.num_rows == 2 * PAIRS and table.column_names == ["answer", "pairs", "length", "logps"]
    train = prepared(place, straight[0]).train_pairs
    for n, (chosen, rejected) in enumerate(train.pairs.tolist()):
        rows = [table.slice(answer, 1).to_pylist()[0] for answer in (chosen, rejected)]
        assert all(train.pair_id(n) in row["pairs"] for row in rows)
        assert [row["length"] for row in rows] == train.learned_lengths[[chosen, rejected]].tolist()


def test_a_file_of_other_weights_is_another_reference(place, model, tmp_path):
    one_weight(model / "model.safetensors")
    file = tmp_path / "table.parquet"
    main([*argv(place, tmp_path / "cache", model=model), f"--output={file}"])
    shutil.rmtree(tmp_path / "cache")
    assert not with_file(place, tmp_path, file).starts_equal


def test_a_file_of_tokens(place, tmp_path):
    """LD-DPO reads a value for each token."""
    file = tmp_path / "table.parquet"
    main([*argv(place, tmp_path / "cache", ld_alpha=0.5), f"--output={file}"])
    expected = tables(place, tmp_path / "cache", ld_alpha=0.5)
    shutil.rmtree(tmp_path / "cache" / "run")
    run = with_file(place, tmp_path, file, ld_alpha=0.5)
    assert np.array_equal(run.table.training, expected[0]) and np.array_equal(run.table.held_out, expected[1])
    shutil.rmtree(tmp_path / "cache" / "run")
    with pytest.raises(UserError, match="has the values of tokens, and this run needs those of answers"):
        with_file(place, tmp_path, file)


def changed_values(file):
    table = pq.read_table(file)
    logps = [[value + 1 for value in values] for values in table["logps"].to_pylist()]
    column = pa.array(logps, pa.list_(pa.float32()))
    pq.write_table(table.set_column(3, "logps", column).replace_schema_metadata(table.schema.metadata), file)


def fewer_answers(file):
    table = pq.read_table(file)
    table = table.slice(1)
    facts = json.loads(table.schema.metadata[b"dpo_ds"]) | {"sha256": _digest(table)}
    del facts["checksum"]
    pq.write_table(table.replace_schema_metadata({"dpo_ds": json.dumps(sealed(facts))}), file)


def forged_facts(file):
    """The file of other weights: its values are whole."""
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"dpo_ds"]) | {"weights": {"model.safetensors": "0"}}
    pq.write_table(table.replace_schema_metadata({"dpo_ds": json.dumps(facts)}), file)


NOT_TAKEN = {
    "other facts": (forged_facts, {}, "does not match its own hash: copy it again"),
    "other pairs": (None, {"max_length": 20}, "of 32 answers of the training pairs: score the same --dataset"),
    "missing answers": (fewer_answers, {}, "has no values of 1 of 32 answers of the training pairs"),
    "other precision": (None, {"precision": "bf16"}, "was computed in fp32, and this run is in bf16"),
    "other values": (changed_values, {}, "does not match its own hash: copy it again"),
    "no Parquet": (lambda file: file.write_text("x"), {}, "cannot be read as Parquet"),
    "not there": (lambda file: file.unlink(), {}, "cannot be read as Parquet"),
    "another table": (lambda file: pq.write_table(pa.table({"a": [1]}), file), {}, "is no table of this version"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_file_that_does_not_fit_is_refused(name, place, parquet, tmp_path):
    change, options, words = NOT_TAKEN[name]
    file = Path(shutil.copy(parquet, tmp_path / "table.parquet"))
    if change:
        change(file)
    with pytest.raises(UserError) as refused:
        with_file(place, tmp_path, file, **options)
    assert words in str(refused.value) and str(refused.value).startswith(f"--reference_table {file}")
    assert "\n" not in str(refused.value) and not (tmp_path / "cache" / "run").exists()


def test_a_flipped_byte_anywhere_in_a_file_is_noticed_or_changes_nothing(place, parquet, tmp_path):
    """Some bytes mean nothing: they are padding, or the name of the library that wrote the file."""
    file, noticed = tmp_path / "table.parquet", 0
    content = parquet.read_bytes()
    whole = TableFile(parquet, "fp32", False)
    places = range(0, len(content), 7)
    for at in places:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = TableFile(file, "fp32", False)
        except UserError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert np.array_equal(found.values, whole.values) and found.rows == whole.rows, at
            assert np.array_equal(found.starts, whole.starts) and found.facts == whole.facts, at
    assert noticed > len(places) / 2
    for size in (0, 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            TableFile(file, "fp32", False)


def test_a_file_of_the_older_format_is_taken(place, parquet, tmp_path):
    table = pq.read_table(parquet)
    facts = json.loads(table.schema.metadata[b"dpo_ds"]) | {"format": 1}
    del facts["checksum"]
    pq.write_table(table.replace_schema_metadata({"dpo_ds": json.dumps(facts)}), tmp_path / "old.parquet")
    old, new = (TableFile(file, "fp32", False).values for file in (tmp_path / "old.parquet", parquet))
    assert np.array_equal(old, new)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": "live"}, "--reference live reads no --reference_table"),
        ({"reference_model": "b"}, "already has the values of a reference: leave out --reference_model"),
        ({"reference_adapter": "b"}, "already has the values of a reference: leave out --reference_adapter"),
    ],
)
def test_a_file_and_another_reference(options, words, place, tmp_path):
    with pytest.raises(UserError, match=words):
        parse_options(argv(place, tmp_path, reference_table="a", **options))
    with pytest.raises(UserError, match="has no effect on --loss simpo"):
        losses_of(parse_options(argv(place, tmp_path, reference_table="a", loss="simpo")))


# -------------------------------------------------------------------------------------------------------------- damage


def unfinish(table: Table, rows: int) -> None:
    """Makes a table one whose scoring was killed after so many rows."""
    logps = table.read()
    logps[rows:] = np.nan
    filled = table.open_to_fill(logps)
    table.write(filled, np.arange(2), logps[:2])


def test_rows_that_are_missing_are_scored_and_the_others_kept(place, straight, scored, tmp_path):
    cache = shutil.copytree(straight[0], tmp_path / "cache")
    for path in cache.glob("reference/*/table.json"):
        facts = json.loads(path.read_text())
        unfinish(Table(cache, {key: facts[key] for key in FACTS}, facts["rows"]), facts["rows"] - CHUNK)
    shutil.rmtree(cache / "run")
    again = tables(place, cache)
    assert sum(scored) == 2 * CHUNK
    for one, other in zip(straight[1], again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.array_equal(one[:-CHUNK], other[:-CHUNK])


FACTS = ("format", "weights", "answers", "precision")  # that decide a table's values


def shorten(folder):
    path = folder / "logps.npy"
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(folder):
    content = bytearray((folder / "logps.npy").read_bytes())
    content[-1] ^= 1
    (folder / "logps.npy").write_bytes(content)


def break_the_head(folder):
    content = bytearray((folder / "logps.npy").read_bytes())
    content[112] = ord("(")
    (folder / "logps.npy").write_bytes(content)


def fewer_rows(folder):
    np.save(folder / "logps.npy", np.load(folder / "logps.npy")[1:])


def unfinished(harm):
    def both(folder):
        harm(folder)
        (folder / "table.json").unlink()

    return both


def forged(**facts):
    """Another table's manifest, with this one's hash."""

    def forge(folder):
        manifest = json.loads((folder / "table.json").read_text())
        del manifest["checksum"]
        (folder / "table.json").write_text(json.dumps(sealed({**manifest, **facts})))

    return forge


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "a broken head": break_the_head,
    "a broken head while it was filled": unfinished(break_the_head),
    "cut short": shorten,
    "cut short while it was filled": unfinished(shorten),
    "emptied": lambda folder: (folder / "logps.npy").write_bytes(b""),
    "emptied while it was filled": unfinished(lambda folder: (folder / "logps.npy").write_bytes(b"")),
    "other rows while it was filled": unfinished(fewer_rows),
    "half a manifest": lambda folder: (folder / "table.json").write_text('{"sha'),
    "another manifest": lambda folder: (folder / "table.json").write_text("{}"),
    "a list for a manifest": lambda folder: (folder / "table.json").write_text("[]"),
    "without its manifest": lambda folder: (folder / "table.json").unlink(),
    "of an older format, unfinished": unfinished(lambda folder: None),
    "of other weights": forged(weights={"model.safetensors": "0"}),
    "of other answers": forged(answers="0"),
}
SAID = {
    **dict.fromkeys(("without its manifest", "of an older format, unfinished"), "has no rows that can be verified"),
    **dict.fromkeys(("of other weights", "of other answers"), "is of other weights or answers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_noticed_and_made_anew(damage, straight, tmp_path, capsys):
    table = copy_of_a_table(straight[0], tmp_path)
    assert np.isfinite(table.read()).all() and capsys.readouterr().out == ""
    DAMAGE[damage](table.folder)
    assert np.isnan(table.read()).all()
    said = SAID.get(damage, "does not match its hash")
    assert f"the reference table {table.folder} {said} and is computed again" in capsys.readouterr().out
    assert not table.path.exists() and not table.manifest.exists()


def test_a_table_that_is_being_filled_is_verified_row_by_row(straight, tmp_path, capsys):
    table = copy_of_a_table(straight[0], tmp_path)
    whole = table.read()
    table.write(table.open_to_fill(np.full_like(whole, np.nan)), np.arange(4), whole[:4])
    rows = np.load(table.path, mmap_mode="r+")
    table.write(rows, np.array([5, 6, 9]), whole[[5, 6, 9]])
    kept = np.isfinite(table.read())
    assert kept.nonzero()[0].tolist() == [0, 1, 2, 3, 5, 6, 9] and capsys.readouterr().out == ""
    rows[6] += 1
    rows[7] = -1.0  # written, but the process was killed before it was vouched for
    rows.flush()
    with open(table.journal, "a") as file:
        file.write('{"rows": [[7, ')
    again = table.read()
    assert np.isfinite(again).nonzero()[0].tolist() == [0, 1, 2, 3]
    assert capsys.readouterr().out == (
        f"dpo_ds: 3 rows of the reference table {table.folder} are damaged: they are computed again\n"
    )
    table.write(table.open_to_fill(again), np.arange(4, len(whole)), whole[4:])
    table.close()
    assert np.array_equal(table.read(), whole) and not table.journal.exists()


def test_a_line_of_the_journal_that_was_changed_vouches_for_nothing(straight, tmp_path):
    table = copy_of_a_table(straight[0], tmp_path)
    unfinish(table, CHUNK)
    text = table.journal.read_text()
    table.journal.write_text(text.replace(f"[[0, {CHUNK}]]", f"[[0, {CHUNK - 1}]]"))
    assert np.isfinite(table.read()).nonzero()[0].tolist() == [0, 1]


def test_a_table_whose_rows_are_gone_is_made_anew(straight, tmp_path):
    table = copy_of_a_table(straight[0], tmp_path)
    table.path.unlink()
    assert np.isnan(table.read()).all() and not table.manifest.exists()


def copy_of_a_table(cache, to) -> Table:
    facts = json.loads(next(cache.glob("reference/*/table.json")).read_text())
    table = Table(to, {key: facts[key] for key in FACTS}, facts["rows"])
    shutil.copytree(cache / "reference" / table.folder.name, table.folder, dirs_exist_ok=True)
    return table


def test_a_table_is_filled_by_one_run_at_a_time(straight, tmp_path):
    from filelock import Timeout

    table, other = copy_of_a_table(straight[0], tmp_path), copy_of_a_table(straight[0], tmp_path)
    with table.lock, pytest.raises(Timeout):
        other.lock.acquire(timeout=0)


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def pairs(place, straight) -> PairSet:
    return prepared(place, straight[0]).train_pairs


def sums(batch) -> torch.Tensor:
    """Stands in for a model: it scores a response by the sum of its token ids."""
    return torch.zeros(batch.answers).index_add_(0, batch.token_answers, batch.targets.float())


def test_rows_come_back_in_the_order_they_were_asked_for(pairs):
    """This holds for several pairs in a micro-batch and for one, though the longest are scored first."""
    answers = np.array([19, 2, 28, 3, 11, 0])
    expected = np.array([pairs.answer(a).sum() for a in answers])
    for limit in (int(pairs.packed_lengths.max()), 10_000):
        assert np.array_equal(score_answers(sums, pairs, answers, limit), expected)


def test_a_log_probability_that_is_not_finite_stops_and_names_the_pair(pairs):
    """The chunks before are kept. The chunk with the bad pair is not."""
    bad, kept = float(pairs.pair(9)[1].sum()), []

    def not_finite(batch):
        logps = sums(batch)
        return torch.where(logps == bad, torch.nan, logps)

    with pytest.raises(RunStopped, match=f"of 1 answers are not finite, in row {pairs.rows[9]}$"):
        score_set(not_finite, pairs, np.arange(32), 250, "title", keep=lambda chunk, _: kept.extend(chunk))
    assert kept == list(range(16))
