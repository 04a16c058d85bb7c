"""The exported generation_config.json: the base's own, byte for byte, but for the token that answers end with."""

import json

import pytest
from transformers import AutoConfig, GenerationConfig, GPT2Config, LlamaConfig

from dpo_ds.models.generation import FILE, ends_of, text_for

CONFIG = LlamaConfig(bos_token_id=1, eos_token_id=2)
PLAIN = '{\n  "bos_token_id": 1,\n  "eos_token_id": 2,\n  "temperature": 0.6\n}\n'

# name: (the base's text, the token that answers end with, the text that is written)
CASES = {
    "it stops there already": (PLAIN, 2, PLAIN),
    "another token": (PLAIN, 7, PLAIN.replace("2,", "[2, 7],")),
    "one of several": (PLAIN.replace("2,", "[2, 7],"), 7, PLAIN.replace("2,", "[2, 7],")),
    "one more": (PLAIN.replace("2,", "[2, 7],"), 9, PLAIN.replace("2,", "[2, 7, 9],")),
    "a list over lines": (PLAIN.replace("2,", "[\n    2,\n    7\n  ],"), 9, PLAIN.replace("2,", "[2, 7, 9],")),
    "null": (PLAIN.replace("2,", "null,"), 7, PLAIN.replace("2,", "7,")),
    "of no single token": (PLAIN, None, PLAIN),
    "a file that transformers refuses to write": (
        '{"do_sample": false, "temperature": 0.9, "eos_token_id":0}', 5,
        '{"do_sample": false, "temperature": 0.9, "eos_token_id":[0, 5]}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_bases_but_for_the_end(name, tmp_path):
    base, end, expected = CASES[name]
    (tmp_path / FILE).write_text(base)
    assert text_for(tmp_path, CONFIG, end) == expected


def test_a_file_without_an_end_gets_one(tmp_path):
    (tmp_path / FILE).write_text('{"top_k": 5}')
    assert json.loads(text_for(tmp_path, CONFIG, 7)) == {"top_k": 5, "eos_token_id": 7}


@pytest.mark.parametrize("config", [CONFIG, GPT2Config()])
def test_a_base_without_the_file_stops_where_its_config_says(config, tmp_path):
    for source in (None, tmp_path):
        text = text_for(source, config, 7)
        assert ends_of(text) == [config.eos_token_id, 7]
    (tmp_path / FILE).write_text(text)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [config.eos_token_id, 7]
    assert json.loads(text)["bos_token_id"] == config.bos_token_id


def test_a_config_of_several_parts_says_it_in_its_text_part():
    config = AutoConfig.for_model("gemma3")
    config.get_text_config().eos_token_id = 106
    assert ends_of(text_for(None, config, None)) == [106]
