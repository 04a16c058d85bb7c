"""Where rows come from: every kind of file, folders, several sources with weights, and what cannot be read."""

import gzip
import json
import logging
import subprocess
import sys
from typing import Any

import datasets
import launching
import layouts
import pandas
import pytest

from dpo_ds.data.files import RAW
from dpo_ds.data.rows.forms import Reading, read_row, require_form
from dpo_ds.data.sources import Source, fields, load_sources, parse_sources
from dpo_ds.errors import UserError

DATA = launching.ROOT.parent / "shared" / "data"
FILES = DATA / "forms"
GOOD = {"prompt": "Once", "chosen": " upon a time.", "rejected": " there was."}
OTHER = {"prompt": "Then", "chosen": " it rained.", "rejected": " nothing."}
needs_forms = pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not here")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def load(tmp_path):
    """Loads sources, with rows kept in a folder of the test's."""
    (tmp_path / "kept").mkdir()
    return lambda text, *more, **options: load_sources(str(text), tmp_path / "kept", *more, **options)


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(split) -> list:
    return [fields(row) for row in split.rows]


# ------------------------------------------------------------------------------------------------------- kinds of file


def as_table(separator: str):
    return lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False, sep=separator)


def as_arrow(path, rows):
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def zipped(text_of):
    return lambda path, rows: path.write_bytes(gzip.compress(text_of(rows).encode()))


COLUMNS = {name: [GOOD[name], OTHER[name]] for name in GOOD}
WRITERS = {
    "a.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "a.ndjson": lambda path, rows: path.write_text(lines(rows)),
    "a.jsonl.gz": zipped(lines),
    "a.json.gz": zipped(json.dumps),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "lines.json": lambda path, rows: path.write_text("\ufeff\n\n" + lines(rows)),
    "one-line.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "array.jsonl": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "data.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows}, indent=1)),
    "columns.json": lambda path, rows: path.write_text(json.dumps(COLUMNS)),
    "pretty-columns.json": lambda path, rows: path.write_text(json.dumps(COLUMNS, indent=2)),
    "pandas.json": lambda path, rows: pandas.DataFrame(rows).to_json(path),
    "a.csv": as_table(","),
    "a.tsv": as_table("\t"),
    "a.csv.gz": as_table(","),
    "a.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "a.arrow": as_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_every_kind_of_file_and_a_folder_of_it(name, in_folder, tmp_path, load):
    place = tmp_path / "data"
    place.mkdir()
    WRITERS[name](place / name, [GOOD, OTHER])
    (loaded,) = load(place if in_folder else place / name)
    assert said(loaded.split) == [GOOD, OTHER] and loaded.split.columns == [*GOOD] and loaded.test is None
    assert (loaded.split.name, loaded.source.weight) == ("train", None)


def test_a_json_file_of_splits(tmp_path, load):
    (tmp_path / "a.json").write_text(json.dumps({"train": [GOOD, GOOD], "test": [OTHER]}))
    (loaded,) = load(tmp_path / "a.json")
    assert said(loaded.split) == [GOOD, GOOD] and said(loaded.test) == [OTHER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
    ],
)
def test_one_row_by_itself_is_a_row(row, tmp_path, load):
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    assert said(load(tmp_path / "a.json")[0].split) == [row]


@needs_forms
def test_the_folders_and_files_of_forms(load):
    assert said(load(FILES / "15_csv_folder")[0].split) == [
        {"prompt": "2+2", "chosen": "4", "rejected": "5"},
        {"prompt": "3+3", "chosen": "6", "rejected": "NA"},
    ]
    assert said(load(FILES / "18_column_oriented.json")[0].split) == [
        {"prompt": "a", "chosen": "x", "rejected": "x1"},
        {"prompt": "b", "chosen": "y", "rejected": "y1"},
    ]
    with pytest.raises(UserError, match="has the configs helpful, harmless: choose one with --dataset_config"):
        load(FILES / "16_configs_folder")
    assert len(load(FILES / "16_configs_folder", config="helpful")[0].split.rows) == 3
    (loaded,) = load(FILES / "17_train_and_test_folder")
    assert {row["prompt"][:5] for row in said(loaded.split)} == {"train"}
    assert {row["prompt"][:4] for row in said(loaded.test)} == {"test"} and loaded.test.name == "test"


def test_a_key_that_stands_twice_in_a_row_is_named(tmp_path, load):
    twice = '{"prompt": "p", "chosen": "old", "chosen": "a", "rejected": "b", "meta": {"x": 1, "x": 2}}'
    (tmp_path / "a.jsonl").write_text(twice + "\n" + lines([GOOD]))
    (tmp_path / "a.json").write_text(f"[{twice}, {json.dumps(GOOD)}]")
    for name in ("a.jsonl", "a.json"):
        first, second = load(tmp_path / name)[0].split.rows
        found = read_row(fields(first), Reading())
        assert found.answers[0].messages[0]["content"] == "a" and fields(second) == GOOD
        assert found.unused == ["column meta", "column x (given twice)", "column chosen (given twice)"]
    (tmp_path / "b.json").write_text(f'{{"data": [{json.dumps(GOOD)}], "data": [{json.dumps(OTHER)}]}}')
    with pytest.raises(UserError, match=r"b\.json has the key data twice in an object"):
        load(tmp_path / "b.json")


@pytest.mark.parametrize("nested", [False, True])
def test_a_damaged_image_costs_no_row_of_text(nested, tmp_path, load):
    image: Any = {"bytes": b"not an image", "path": None}
    made = datasets.Dataset.from_list([{**GOOD, "photo": [image] if nested else image}])
    feature = datasets.List(datasets.Image()) if nested else datasets.Image()
    made.cast_column("photo", feature).to_parquet(tmp_path / "set" / "a.parquet")
    for source in (tmp_path / "set" / "a.parquet", tmp_path / "set"):
        (row,) = load(source)[0].split.rows
        assert read_row(fields(row), Reading()).unused == ["column photo"]


def test_rows_that_differ_in_type(tmp_path, load):
    rows = [GOOD, 7, {**GOOD, "chosen": 5}, {"prompt": [{"role": "user", "content": "x"}]}, None, [GOOD], OTHER]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        assert said(load(tmp_path / name)[0].split) == rows


def test_keys_of_any_row_are_columns(tmp_path, load):
    (tmp_path / "a.jsonl").write_text(lines([GOOD, {**OTHER, "weight": 2}]))
    assert load(tmp_path / "a.jsonl")[0].split.columns == [*GOOD, "weight"]


def test_a_line_separator_within_a_string_ends_no_row(tmp_path, load):
    odd = {**GOOD, "prompt": "one\u2028two\x85three\r"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in [odd, 7]))
    assert said(load(tmp_path / "a.jsonl")[0].split) == [odd, 7]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_row_that_is_not_utf_8_is_kept_for_the_report(name, tmp_path, load):
    content = lines([GOOD]).encode() + lines([GOOD]).encode().replace(b"Once", b"Onc\xe9") + lines([OTHER]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = said(load(tmp_path / name)[0].split)
    assert rows[::2] == [GOOD, OTHER] and rows[1]["prompt"] == "Onc\udce9"


def test_cells_of_a_table_are_text_even_where_they_look_like_numbers_or_nothing(tmp_path, load):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected,weight\n2+2,4,NA,0.5\n\n1+1,"a,\nb",null,\n')
    assert said(load(tmp_path / "a.csv")[0].split) == [
        {"prompt": "2+2", "chosen": "4", "rejected": "NA", "weight": "0.5"},
        {"prompt": "1+1", "chosen": "a,\nb", "rejected": "null", "weight": ""},
    ]


LARGE = """
import json, resource, sys
from pathlib import Path
from dpo_ds.data.sources import fields, load_sources
path, folder = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(loaded,) = load_sources(str(path), folder)
print(len(loaded.split.rows), before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_file_is_read_in_a_stream(name, tmp_path):
    """200 MB of rows that differ in type take less than 100 MB."""
    (tmp_path / "kept").mkdir()
    with open(tmp_path / name, "w") as file:
        file.write("[" if name == "a.json" else "")
        for n in range(1000):
            row = json.dumps({"prompt": n if n % 2 else str(n), "chosen": "a" * 200_000, "rejected": "b"})
            file.write(row + (("\n" if n < 999 else "]") if name == "a.jsonl" else ("," if n < 999 else "]")))
        if name == "a.jsonl":
            file.seek(file.tell() - 1)
            file.truncate()
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / name, tmp_path / "kept"],
        env=launching.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows, before, after = map(int, done.stdout.split())
    assert rows == 1000 and after - before < 100


# ------------------------------------------------------------------------------------- folders, globs, splits, configs


def write(folder, files: dict[str, list]) -> None:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS["a" + "".join(path.suffixes)](path, rows)


def test_several_files_are_one_set(tmp_path, load):
    write(tmp_path, {"one/b1.jsonl": [GOOD], "one/b2.jsonl": [OTHER], "one/c.csv": [GOOD], "two/b.parquet": [GOOD] * 3})
    assert said(load(tmp_path / "one" / "b*.jsonl")[0].split) == [GOOD, OTHER]
    assert said(load(tmp_path / "one" / "[bc]*")[0].split) == [GOOD, OTHER, GOOD], "a table beside JSON"
    assert len(load(tmp_path / "**" / "*.parquet")[0].split.rows) == 3
    with pytest.raises(UserError, match=r"d\*\.jsonl matches no file"):
        load(tmp_path / "d*.jsonl")


def test_a_folder_is_one_set_unless_its_files_are_called_as_splits(tmp_path, load):
    write(
        tmp_path,
        {"one/b1.jsonl": [GOOD], "one/b2.jsonl": [OTHER], "two/train.jsonl": [GOOD] * 3, "two/test.jsonl": [OTHER]},
    )
    assert said(load(tmp_path / "one")[0].split) == [GOOD, OTHER]
    (loaded,) = load(tmp_path / "two")
    assert (len(loaded.split.rows), said(loaded.test)) == (3, [OTHER])
    (loaded,) = load(tmp_path / "two", role="eval")
    assert said(loaded.split) == [OTHER] and loaded.test is None


def test_a_folder_of_several_kinds_is_refused(tmp_path, load):
    write(tmp_path, {"a.csv": [GOOD], "b.jsonl": [OTHER]})
    with pytest.raises(UserError, match=r"holds files of several kinds, one of them .*: name those of one kind"):
        load(tmp_path)


def test_a_saved_dataset_is_read_and_nothing_is_written_beside_it(tmp_path, load):
    datasets.Dataset.from_list([GOOD, OTHER]).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.joinpath("saved").iterdir())
    assert said(load(tmp_path / "saved")[0].split) == [GOOD, OTHER]
    assert sorted(tmp_path.joinpath("saved").iterdir()) == before


@pytest.fixture
def with_splits(tmp_path):
    counts = {"train_sft": 5, "train_prefs": 3, "test_sft": 4, "test_prefs": 2, "test_gen": 1}
    sets = {name: datasets.Dataset.from_list([GOOD] * count) for name, count in counts.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def test_the_preference_splits_are_found_with_the_tests_that_go_with_them(with_splits, load):
    (loaded,) = load(with_splits)
    assert (loaded.split.name, len(loaded.split.rows)) == ("train_prefs", 3)
    assert (loaded.test.name, len(loaded.test.rows)) == ("test_prefs", 2)
    (loaded,) = load(with_splits, role="eval")
    assert (loaded.split.name, loaded.test) == ("test_prefs", None)


def test_a_split_may_be_named(with_splits, load):
    (loaded,) = load(with_splits, "train_sft")
    assert (len(loaded.split.rows), loaded.test.name) == (5, "test_sft")
    assert load(with_splits, "test_gen")[0].test is None, "who trains on a test split holds out from it"
    with pytest.raises(UserError, match=r"no split dev; --dataset_split takes train_sft, train_prefs, test_sft"):
        load(with_splits, "dev")


def test_splits_that_say_nothing_must_be_chosen(tmp_path, load):
    sets = {name: datasets.Dataset.from_list([GOOD]) for name in ("easy", "hard")}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits easy, hard: choose one with --dataset_split"):
        load(tmp_path / "splits")
    with pytest.raises(
        UserError, match=r"--eval_dataset .* has the splits easy, hard, none of which is called test"
    ) as error:
        load(tmp_path / "splits", role="eval")
    assert "--dataset_split" not in str(error.value)


CONFIGS = "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.csv\n---\n"


def test_configs(tmp_path, load):
    write(tmp_path / "set", {"a.jsonl": [GOOD], "b.csv": [OTHER] * 2})
    (tmp_path / "set" / "README.md").write_text(CONFIGS)
    with pytest.raises(UserError, match="has the configs one, two: choose one with --dataset_config"):
        load(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"--eval_dataset .* has the configs one, two: name a file or a folder of one"
    ) as error:
        load(tmp_path / "set", role="eval")
    assert "--dataset_config" not in str(error.value)
    with pytest.raises(UserError, match="has no config three; --dataset_config takes one, two"):
        load(tmp_path / "set", config="three")
    assert said(load(tmp_path / "set", config="one")[0].split) == [GOOD]
    with pytest.raises(UserError, match=r"a\.jsonl is a file, which has no configs"):
        load(tmp_path / "set" / "a.jsonl", config="one")
    with pytest.raises(UserError, match=r"names 2 sets, and --dataset_config one says the config of one: name a file"):
        load(f"{tmp_path / 'set'},{tmp_path / 'set'}", config="one")


def test_the_embedded_sample(load):
    (loaded,) = load("sample")
    assert len(loaded.split.rows) > 100 and read_row(fields(loaded.split.rows[0]), Reading()).pairs


@pytest.mark.parametrize("name", layouts.LARGEST)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_largest_public_layouts_load_by_name_alone(name, kind, tmp_path, load):
    """Also from Parquet, where `datasets` gives every object the keys of all others."""
    made = [layouts.LARGEST[name](n) for n in range(10)]
    WRITERS[f"a.{kind}"](tmp_path / f"a.{kind}", [one.row for one in made])
    (loaded,) = load(tmp_path / f"a.{kind}")
    require_form(loaded.split.columns, Reading())
    for one, row in zip(made, loaded.split.rows, strict=True):
        found = read_row(fields(row), Reading())
        (pair,) = found.pairs
        assert found.messages == one.messages
        assert found.answers[pair.chosen].messages[0]["content"] == one.chosen
        assert found.answers[pair.rejected].messages[0]["content"] == one.rejected


# ------------------------------------------------------------------------------------------------- names and weights


def test_names_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:0.5.jsonl", "c,d.jsonl", "e:1"):
        (tmp_path / name).touch()
    assert parse_sources("a.jsonl") == [Source("a.jsonl")]
    assert parse_sources("a.jsonl:0.7,b/c:0.3") == [Source("a.jsonl", 0.7), Source("b/c", 0.3)]
    assert parse_sources("a.jsonl, b/c") == [Source("a.jsonl"), Source("b/c")]
    assert parse_sources("b:0.5.jsonl") == [Source("b:0.5.jsonl")]
    assert parse_sources("c,d.jsonl") == [Source("c,d.jsonl")]
    assert parse_sources("c,d.jsonl:0.25,e:1:0.75") == [Source("c,d.jsonl", 0.25), Source("e:1", 0.75)]
    assert parse_sources("a/b:0.1,c/d:0.2,e/f:0.7")[2].weight == 0.7
    assert parse_sources("hf://datasets/a") == [Source("hf://datasets/a")]


BAD = {
    "do not sum": ("a:0.5,b:0.6", "the weights sum to 1.1; they must sum to 1"),
    "hardly sum": ("a:0.5,b:0.50001", "the weights sum to 1.00001; they must sum to 1"),
    "one alone": ("a:0.5,b", "b has no weight; give one to each set .*, or to none"),
    "no number": ("a:half,b:0.5", "a:half: half is not a weight"),
    "nothing": ("a:,b:0.5", "a:: nothing is not a weight"),
    "zero": ("a:0,b:1", "a:0: a weight must be above 0"),
    "below zero": ("a:-1,b:2", "a:-1: a weight must be above 0"),
    "not a number": ("a:nan,b:1", "a:nan: a weight must be above 0"),
    "no name": ("a,,b", "an empty name stands between the commas"),
    "none at all": ("", "an empty name stands"),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_cannot_be(case, load):
    text, message = BAD[case]
    with pytest.raises(UserError, match=rf"^--dataset .*{message}") as error:
        load(text)
    assert "\n" not in str(error.value)


def test_a_mix(tmp_path, load):
    write(tmp_path, {"a.jsonl": [GOOD] * 4, "b.csv": [OTHER] * 2})
    first, second = load(f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.csv:0.75")
    assert (first.source.weight, second.source.weight) == (0.25, 0.75)
    assert said(first.split) == [GOOD] * 4 and said(second.split) == [OTHER] * 2
    with pytest.raises(UserError, match=r"^--eval_dataset weights mix training pairs"):
        load(f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.csv:0.75", role="eval")
    assert len(load(f"{tmp_path}/a.jsonl,{tmp_path}/b.csv", role="eval")) == 2


# --------------------------------------------------------------------------------------------- what cannot be loaded


def truncated_gzip() -> bytes:
    return gzip.compress(lines([{**GOOD, "prompt": str(n)} for n in range(200)]).encode())[:-20]


UNREADABLE = {
    "missing file": ("none.jsonl", None, "is not there"),
    "wrong suffix": ("a.txt", b"x", r"ends in \.txt; it must be one of \.jsonl, .*\.jsonl\.gz"),
    "no suffix": ("pairs", b"x", "ends in nothing"),
    "wrong suffix within gzip": ("a.txt.gz", gzip.compress(b"x"), r"ends in \.txt\.gz; it must be one of"),
    "empty jsonl": ("a.jsonl", b"", "holds no rows"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "empty csv": ("a.csv", b"", "cannot be read as csv: it is empty"),
    "csv of a heading": ("a.csv", b"prompt,chosen,rejected\n", "holds no rows"),
    "csv with a cell too many": ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, but the heading has 2"),
    "csv with a cell too few": ("a.csv", b"a,b\n1\n", "line 2 has 1 cell, but the heading has 2"),
    "csv with a column twice": ("a.csv", b"a,b,a\n1,2,3\n", "its heading has a twice"),
    "csv with a stray quote": ("a.csv", b'a,b\n1,2\n"x"y,2\n', "line 3 cannot be read as csv"),
    "csv that is not UTF-8": ("a.csv", b"prompt,chosen,rejected\np\xff,a,b\n", "line 2 is not UTF-8"),
    "empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
    "no arrow": ("a.arrow", b"x", "cannot be read as arrow"),
    "broken line": ("a.jsonl", (lines([GOOD, GOOD]) + '{"prompt":\n').encode(), "line 3 is not JSON .*or remove it"),
    "broken first line": ("a.jsonl", b'{"prompt":\n' + lines([GOOD]).encode(), "line 1 is not JSON"),
    "broken array": ("a.json", b'[{"prompt": "p"},', "row 1 .counted from 0. is not JSON"),
    "broken element": ("a.json", b'[{"prompt": "p"}, {"prompt" "q"}]', "row 1 .counted from 0. is not JSON"),
    "broken object": ("a.json", b'{"prompt": "p"', "line 1 is not JSON"),
    "broken line after empty ones": ("a.jsonl", b'\n\n{"prompt": "p"}\n\n{"prompt":\n', "line 5 is not JSON"),
    "csv with cells of several lines": ("a.csv", b'a,b\n"1\n2",3\n4\n', "line 4 has 1 cell"),
    "no gzip": ("a.jsonl.gz", lines([GOOD]).encode(), "cannot be read: Not a gzipped file"),
    "truncated gzip": ("a.jsonl.gz", truncated_gzip(), "cannot be read: .*ended before"),
    "truncated csv": (
        "a.csv.gz",
        gzip.compress(b"a,b\n" + b"1,2\n" * 999)[:-10],
        "cannot be read as csv: .*ended before",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_says_so_in_one_line(case, tmp_path, load, caplog, monkeypatch):
    name, content, message = UNREADABLE[case]
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # to caplog
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not caplog.records, "the library says nothing beside it"


def test_a_folder_without_data_says_so(tmp_path, load):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match="folder without data"):
        load(tmp_path / "notes")


def test_a_hub_id_that_cannot_be_reached_says_so(load):
    with pytest.raises(UserError, match="some/set is not a local file and cannot be read from the hub: check the id"):
        load("some/set")


def test_rows_of_json_are_kept_as_text(tmp_path, load):
    """What the cache relies on: one column, whatever the rows say."""
    (tmp_path / "a.jsonl").write_text(lines([GOOD]))
    assert load(tmp_path / "a.jsonl")[0].split.rows.column_names == [RAW]


@pytest.mark.parametrize(
    ("name", "sign", "read"),
    [("a.csv", ";", 3), ("a.csv", "\t", 3), ("a.tsv", ",", 3), ("a.csv", ",", 3), ("a.csv", "|", 3), ("a.csv", "/", 1)],
)
def test_the_heading_of_a_table_says_what_separates_its_cells(tmp_path, name, sign, read):
    (tmp_path / name).write_text(f'prompt{sign}chosen{sign}rejected\n"Hi, you; there"{sign}"a, b"{sign}c\n')
    if read == 1:
        with pytest.raises(UserError, match="line 2 "):
            load_sources(str(tmp_path / name), tmp_path)
        return
    (loaded,) = load_sources(str(tmp_path / name), tmp_path)
    assert list(loaded.split.rows) == [{"prompt": "Hi, you; there", "chosen": "a, b", "rejected": "c"}]
