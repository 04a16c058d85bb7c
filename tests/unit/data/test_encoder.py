"""Pairs as token ids: chat templates, where a response begins and ends, truncation, the cache, the held-out part."""

import multiprocessing

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_ds.config import parse_options
from dpo_ds.data import cache
from dpo_ds.data.cache import tokenize_pairs
from dpo_ds.data.chat import FOLDED, REWRITTEN
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.counts import Report
from dpo_ds.data.encoded import EQUAL_NOW, NO_ROOM, Encoded
from dpo_ds.data.encoder import MOVED, Encoder, Tokenizing
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.rows import check_preferences, prompt_hash
from dpo_ds.data.sources import load_preferences
from dpo_ds.data.template import REFUSED
from dpo_ds.data.truncate import CUT_PROMPT, CUT_RESPONSE
from dpo_ds.errors import UserError
from dpo_ds.ranks.world import from_environment
from dpo_ds.runs.prepare import load_pairs

SENTENCES = ["What is the answer? The answer is here.", "Is the answer right? No answer, no question."] * 8
LONG = 10**6


def tokenizer(template=None, specials=("<s>", "</s>"), bos="<s>", eos="</s>", adds="$A", extra=()):
    """A byte-level BPE of some 300 tokens. `adds`: what it writes around a text by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    if adds != "$A":
        ids = [(token, bpe.token_to_id(token)) for token in specials]
        bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    bpe.add_tokens(list(extra))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, chat_template=template, extra_special_tokens=list(specials)
    )


def row(prompt="What is the answer?", chosen=" It is here.", rejected=" No.", messages=None) -> Comparison:
    messages = [{"role": "user", "content": prompt}] if messages is None else messages
    answers = [Answer([{"role": "assistant", "content": text}], text) for text in (chosen, rejected)]
    return Comparison(messages, answers, [Preference(0, 1)], prompt)


def encode(tok, *rows: Comparison, max_length=LONG, **options) -> list[Encoded]:
    return Encoder(tok, Tokenizing(max_length, **options)).encode(list(rows))


def parts_of(pair: Encoded) -> tuple[list[int], ...]:
    return pair.prompt, *pair.answers


def texts(tok, pair: Encoded) -> tuple[str, ...]:
    return tuple(tok.decode(part) for part in parts_of(pair))


# ---------------------------------------------------------------------------------------------------- without template


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_plain_text_is_concatenated_and_ends_with_eos(adds):
    """Whatever the tokenizer adds by itself: BOS once, EOS after the responses alone, no token otherwise changed."""
    tok = tokenizer(adds=adds)
    (pair,) = encode(tok, row())
    bos = "<s>" if "<s>" in adds else ""
    assert texts(tok, pair) == (f"{bos}What is the answer?", " It is here.</s>", " No.</s>")
    plain = tok("What is the answer? It is here.", add_special_tokens=False)["input_ids"]
    assert [*([tok.bos_token_id] if bos else []), *plain, tok.eos_token_id] == pair.prompt + pair.answers[0]
    assert not pair.changed and not pair.left_out


def test_bos_and_eos_that_the_text_has_already_are_not_doubled():
    (pair,) = encode(tok := tokenizer(adds="<s> $A </s>"), row("<s>What?", " Here.</s>", " No."))
    assert texts(tok, pair) == ("<s>What?", " Here.</s>", " No.</s>")


@pytest.mark.parametrize(("bos", "first"), [("<s>", "<s>"), (None, "</s>"), ("</s>", "</s>")])
def test_an_empty_prompt_is_one_token_to_predict_from(bos, first):
    (pair,) = encode(tok := tokenizer(bos=bos), row("", "Here.", "No."))
    assert texts(tok, pair) == (first, "Here.</s>", "No.</s>")


def test_chat_template_none_is_plain_concatenation():
    (pair,) = encode(tok := tokenizer(CHATML, *CHATML_TOKENS), row(), chat_template="none")
    assert texts(tok, pair) == ("What is the answer?", " It is here.<|endoftext|>", " No.<|endoftext|>")


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(tokenizer(eos=None), Tokenizing(100))


# ------------------------------------------------------------------------------------------------------ chat templates

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>")
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>"
    "\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BARS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
HASHES = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
ASK = "What is the answer?"
# shape: tokenizer, the prompt, what stands before the answer in the response, what ends it
SHAPES = {
    "Llama-3": (
        lambda: tokenizer(HEADERS, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                    "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|begin_of_text|> $A"),
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{ASK}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    "ChatML, as Qwen2": (
        lambda: tokenizer(CHATML, *CHATML_TOKENS),
        f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
    "Gemma": (
        lambda: tokenizer(NO_SYSTEM, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>",
                          "<bos> $A"),
        f"<bos><start_of_turn>user\n{ASK}<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>"),
    "Phi-3": (
        lambda: tokenizer(BARS, ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>",
                          "<|endoftext|>"),
        f"<|user|>\n{ASK}<|end|>\n<|assistant|>\n", "", "<|end|>"),
    "Mistral": (
        lambda: tokenizer(INST, adds="<s> $A"), f"<s>[INST] {ASK} [/INST]", " ", "</s>"),
    "no special tokens at all": (
        lambda: tokenizer(HASHES, adds="<s> $A </s>"), f"### user:\n{ASK}\n\n### assistant:\n", "", "</s>"),
    "runs of blanks among the added tokens": (
        lambda: tokenizer(CHATML.replace("<|im_end|>\n", "\n<|im_end|>\n"), *CHATML_TOKENS, extra=["\n", "\n\n"]),
        f"<|im_start|>user\n{ASK}\n<|im_end|>\n<|im_start|>assistant\n", "", "\n<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_templates_response_ends_with_its_end_of_turn_and_nothing_after(shape):
    make, prompt, before, end = SHAPES[shape]
    tok = make()
    (pair,) = encode(tok, row(ASK, " It is here.\n", "No."))
    assert texts(tok, pair) == (prompt, f"{before}It is here.{end}", f"{before}No.{end}")
    assert not pair.changed and not pair.left_out
    for response in pair.answers:
        assert (pair.prompt + response).count(tok.bos_token_id) == prompt.count(tok.bos_token or "no BOS")
        whole = tok(prompt + tok.decode(response), add_special_tokens=False)["input_ids"]
        assert pair.prompt + response == whole


def test_a_multi_turn_prompt_is_rendered_whole():
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Sing")]
    (pair,) = encode(
        tok := SHAPES["Gemma"][0](), row(messages=[{"role": role, "content": text} for role, text in turns])
    )
    said = "".join(f"<start_of_turn>{'model' if r == 'assistant' else r}\n{t}<end_of_turn>\n" for r, t in turns)
    assert texts(tok, pair)[0] == f"<bos>{said}<start_of_turn>model\n"


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sing"}]


def test_a_system_role_that_the_template_refuses_goes_into_the_first_user_turn_and_is_counted():
    (pair,) = encode(tok := SHAPES["Gemma"][0](), row(messages=SYSTEM))
    said = "<bos><start_of_turn>user\nBe brief.\n\nSing<end_of_turn>\n<start_of_turn>model\n"
    assert texts(tok, pair) == (said, "It is here.<end_of_turn>", "No.<end_of_turn>") and pair.changed == [FOLDED]


def test_a_system_role_that_the_template_takes_stays():
    (pair,) = encode(tok := SHAPES["ChatML, as Qwen2"][0](), row(messages=SYSTEM))
    assert texts(tok, pair)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSing<|im_end|>")
    assert pair.changed == []


@pytest.mark.parametrize(
    ("roles", "quoted"),
    [
        (["user", "user"], "turns"),
        (["assistant", "user"], "turns"),
        (["system"], "no system"),
        (["system", "user", "user"], "turns"),
    ],
)
def test_a_dialogue_that_the_template_refuses_is_left_out_without_its_neighbours(roles, quoted):
    refused = row(messages=[{"role": role, "content": "x"} for role in roles])
    first, second, third = encode(tok := SHAPES["Gemma"][0](), row(), refused, row(chosen="Yes."))
    assert (first.left_out, second.left_out, third.left_out) == ("", f"{REFUSED}: {quoted}", "")
    assert texts(tok, third)[1] == "Yes.<end_of_turn>"


def test_a_template_that_takes_no_dialogue_names_the_remedy():
    with pytest.raises(UserError, match=r"takes no plain dialogue \(tools first\); use --chat_template none"):
        Encoder(tokenizer("{{ raise_exception('tools first') }}"), Tokenizing(100))


# -------------------------------------------------------------------------------------------------------- the boundary


def test_a_merge_across_the_boundary_moves_it_back_and_is_counted():
    """ "answ" and "er" make one token, so the shared prompt ends before it, for both responses."""
    tok = tokenizer()
    merged, plain = encode(tok, row("What is the answ", "er here?", "ing?"), row("What is the", " answer?", " here?"))
    assert texts(tok, merged) == ("What is the", " answer here?</s>", " answing?</s>")
    assert merged.changed == [MOVED] and plain.changed == []


def test_a_token_that_reaches_into_an_answer_in_the_middle_of_a_dialogue_is_scored():
    """Here too "answ" and "er" make one token. It belongs to the answer, as at the boundary of the prompt."""
    merging = "{% for m in messages %}{{ ' answ' if m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
    merging += "{% if add_generation_prompt %} answ{% endif %}"
    turns = [{"role": role, "content": "er here"} for role in ("assistant", "user", "assistant")]
    one, other = Answer(turns), Answer([{"role": "assistant", "content": "er right"}])
    question = [{"role": "user", "content": "What is the"}]
    (pair,) = encode(tok := tokenizer(merging), Comparison(question, [one, other], [Preference(0, 1)]))
    tokens = zip([tok.decode([token]) for token in pair.answers[0]], pair.scored[0], strict=True)
    assert list(tokens) == [(" answer", True), (" here", True), ("</s>", True), ("er", False), (" here", False),
                            ("</s>", False), (" answer", True), (" here", True), ("</s>", True)]  # fmt: skip


def test_a_boundary_at_the_very_start_still_leaves_a_token_to_predict_from():
    (pair,) = encode(tok := tokenizer(), row("Th", "e answer", "is"))
    assert texts(tok, pair) == ("<s>", "The answer</s>", "This</s>") and pair.changed == [MOVED]


def test_a_template_that_writes_answers_otherwise_than_its_generation_prompt():
    thinking = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    (pair,) = encode(tok := tokenizer(thinking, *CHATML_TOKENS), row("Hi"))
    prompt, chosen, rejected = texts(tok, pair)
    assert prompt + chosen == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nIt is here.<|im_end|>"
    assert prompt + rejected == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"
    assert pair.changed == [REWRITTEN]


def test_prompt_and_response_are_the_tokens_of_the_whole_text_wherever_it_is_split():
    """Random splits of a text: prompt + response is the text's own tokenisation, the prompt a prefix of its own."""
    tok, generator = tokenizer(), np.random.default_rng(0)
    text = " ".join(SENTENCES[:2])
    splits = [np.sort(generator.integers(1, len(text), 2)) for _ in range(200)]
    rows = [row(text[:a], text[a:b] + "x", text[a:] + "y") for a, b in splits]
    moved = 0
    for one, pair in zip(rows, encode(tok, *rows), strict=True):
        whole = [tok(one.text + answer.text)["input_ids"] + [tok.eos_token_id] for answer in one.answers]
        own = tok(one.text)["input_ids"]
        boundary = max(n for n in range(len(own) + 1) if own[:n] == whole[0][:n] == whole[1][:n])
        assert pair.prompt == (own[:boundary] or [tok.bos_token_id])
        assert pair.answers == [whole[0][boundary:], whole[1][boundary:]]
        assert (MOVED in pair.changed) == (boundary < len(own))
        moved += boundary < len(own)
    assert 20 < moved < 180


# ---------------------------------------------------------------------------------------------------------- truncation


def slow_keep_end(prompt, chosen, rejected, limit, bos):
    """Prompt tokens go one by one from the left while the longer response does not fit; then responses' last ones."""
    prompt, responses = list(prompt), [list(chosen), list(rejected)]
    while len(prompt) > 1 and len(prompt) + max(map(len, responses)) > limit:
        del prompt[1 if prompt[0] == bos and len(prompt) > 2 else 0]  # BOS stays while there is another
    for response in responses:
        while len(prompt) + len(response) > limit:
            response.pop()
    return prompt, *responses


def slow_keep_start(prompt, chosen, rejected, limit, bos):
    kept = [(prompt + response)[:limit] for response in (chosen, rejected)]
    return kept[0][: len(prompt)], kept[0][len(prompt) :], kept[1][len(prompt) :]


@pytest.mark.parametrize("adds", ["$A", "<s> $A"])
@pytest.mark.parametrize(("truncation", "slow"), [("keep_end", slow_keep_end), ("keep_start", slow_keep_start)])
def test_truncation_does_what_the_slow_version_does(truncation, slow, adds):
    tok, generator = tokenizer(adds=adds), np.random.default_rng(0)

    def words(most):
        return "".join(generator.choice([" here", " is", " no"], generator.integers(1, most)))

    rows = [row(words(30), words(most), words(30)) for most in (3, 30) for _ in range(50)]
    whole = encode(tok, *rows)
    seen = set()
    for limit in (2, 3, 5, 8, 13, 21, 34, 49):
        for pair, cut in zip(whole, encode(tok, *rows, max_length=limit, truncation=truncation), strict=True):
            full = parts_of(pair)
            prompt, chosen, rejected = slow(*full, limit, tok.bos_token_id)
            left_out = NO_ROOM if not chosen or not rejected else EQUAL_NOW if chosen == rejected else ""
            assert cut.left_out == left_out
            seen.add(left_out)
            if left_out:
                continue
            assert parts_of(cut) == (prompt, chosen, rejected)
            assert len(prompt) + max(len(chosen), len(rejected)) <= limit and prompt
            kinds = {CUT_PROMPT} if len(prompt) < len(full[0]) else set()
            kinds |= {CUT_RESPONSE} if (chosen, rejected) != tuple(full[1:]) else set()
            assert set(cut.changed) == kinds
            seen |= kinds
    assert seen == ({"", CUT_PROMPT, CUT_RESPONSE, EQUAL_NOW} if slow is slow_keep_end else
                    {"", CUT_RESPONSE, EQUAL_NOW, NO_ROOM})  # fmt: skip


def test_the_smallest_max_length_keeps_a_token_of_each():
    """What is left of the prompt is its end, so that BOS goes too."""
    tok = tokenizer(adds="<s> $A")
    (pair,) = encode(tok, row("What is the", " answer", " here"), max_length=2)
    assert [len(part) for part in parts_of(pair)] == [1, 1, 1]
    assert texts(tok, pair)[0] == " the" and pair.left_out == ""
    (pair,) = encode(tok, row("What is the", " answer", " here"), max_length=2, truncation="keep_start")
    assert pair.left_out == NO_ROOM


def test_what_just_fits_is_not_cut():
    (whole,) = encode(tok := tokenizer(), row())
    limit = len(whole.prompt) + max(map(len, whole.answers))
    for truncation in ("keep_end", "keep_start"):
        assert encode(tok, row(), max_length=limit, truncation=truncation) == [whole]
        assert encode(tok, row(), max_length=limit - 1, truncation=truncation) != [whole]


# -------------------------------------------------------------------------------------------------- on disk, by content

COUNT = 40


def checked_rows(count=COUNT, **changes):
    """Rows as check_preferences gives them; `changes`: {field: value} of row 3."""
    rows = [{"prompt": f"Question {n}:", "chosen": f" answer {n}", "rejected": f" no {n * n}"} for n in range(count)]
    rows[3] |= changes
    return check_preferences(datasets.Dataset.from_list(rows))[0]


def tokenised(cache, rows=None, tok=None, max_length=64, report=None, num_proc=None, **options) -> PairSet:
    rows = checked_rows() if rows is None else rows
    report = Report(len(rows)) if report is None else report
    options = Tokenizing(max_length, **options)
    return PairSet.open(tokenize_pairs(rows, tok or tokenizer(), options, cache, report, num_proc))


def folders(cache) -> list:
    return sorted(cache.iterdir())


def same(one: PairSet, other: PairSet) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in PairSet.__dataclass_fields__)


def test_a_set_holds_every_pair_as_encoded(tmp_path):
    rows, tok = checked_rows(), tokenizer()
    pairs = tokenised(tmp_path, rows, tok)
    encoded = encode(tok, *[row(r["text"], r["chosen"], r["rejected"]) for r in rows], max_length=64)
    assert len(pairs) == COUNT and pairs.tokens.dtype == np.int32 and isinstance(pairs.tokens, np.memmap)
    for n, expected in enumerate(encoded):
        assert [list(part) for part in pairs.pair(n)] == list(parts_of(expected))
        assert pairs.packed_lengths[n] == sum(map(len, parts_of(expected)))
        assert pairs.prompt_hashes[n].tobytes() == prompt_hash(rows[n]["text"])
    assert len({pairs.pair_id(n) for n in range(COUNT)}) == COUNT and list(pairs.rows) == list(range(COUNT))


def test_a_subset_is_a_view_of_some_pairs_in_that_order(tmp_path):
    pairs = tokenised(tmp_path)
    some = pairs.subset([7, 2])
    assert len(some) == 2 and some.tokens is pairs.tokens and list(some.rows) == [7, 2]
    assert all(np.array_equal(a, b) for a, b in zip(some.pair(0), pairs.pair(7), strict=True))
    assert some.digest != pairs.subset([2, 7]).digest and some.digest == pairs.subset([7, 2]).digest


def test_the_same_content_is_tokenised_once(tmp_path, monkeypatch):
    first = tokenised(tmp_path)
    (folder,) = folders(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    assert set(before) == {"manifest.json", *(f"{name}.npy" for name in PairSet.__dataclass_fields__)}
    monkeypatch.setattr(cache, "_write", None)
    assert same(first, tokenised(tmp_path))
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_where_the_rows_come_from_and_how_they_are_cut_up_does_not_matter(tmp_path, monkeypatch):
    """A file of another kind, and the same rows out of a larger table in another arrangement."""
    pairs = [{"prompt": f"p{n}", "chosen": f" a{n}", "rejected": " b"} for n in range(30)]
    whole = datasets.Dataset.from_list(pairs)
    whole.to_json(tmp_path / "a.jsonl")
    whole.to_parquet(tmp_path / "a.parquet")
    scattered = datasets.concatenate_datasets([whole.select(range(10, 30)), whole.select([5, 4, 3, 2, 1, 0])])
    scattered = datasets.concatenate_datasets([scattered, whole.select(range(6, 10))]).select(
        [*range(25, 19, -1), *range(26, 30), *range(20)]
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    sources = [load_preferences(str(tmp_path / name)) for name in ("a.jsonl", "a.parquet")] + [whole, scattered]
    for source in sources:
        tokenised(tmp_path / "cache", check_preferences(source)[0])
    assert len(folders(tmp_path / "cache")) == 1


MISSES = {
    "a response": dict(rows=lambda: checked_rows(chosen=" another")),
    "a prompt": dict(rows=lambda: checked_rows(prompt="Another:")),
    "a row less": dict(rows=lambda: checked_rows(COUNT - 1)),
    "max_length": dict(max_length=65),
    "truncation": dict(truncation="keep_start"),
    "chat_template": dict(chat_template="none"),
    "the template": dict(tok=lambda: tokenizer(CHATML)),
    "the special tokens": dict(tok=lambda: tokenizer(eos="<s>")),
    "what the tokenizer adds": dict(tok=lambda: tokenizer(adds="<s> $A")),
    "the vocabulary": dict(tok=lambda: tokenizer(extra=["Question"])),
}


@pytest.mark.parametrize("what", MISSES)
def test_another_content_is_another_set(what, tmp_path):
    tokenised(tmp_path)
    changes = {key: value() if callable(value) else value for key, value in MISSES[what].items()}
    tokenised(tmp_path, **changes)
    assert len(folders(tmp_path)) == 2


def test_a_hit_reports_what_the_first_time_did(tmp_path):
    long = checked_rows(prompt="What is the answer? " * 20)
    reports = [Report(COUNT), Report(COUNT)]
    for report in reports:
        tokenised(tmp_path, long, report=report)
    assert reports[0].lines() == reports[1].lines() == ["40 of 40 pairs are used", f"1 changed: {CUT_PROMPT} (row 3)"]


def test_several_processes_give_the_set_that_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 1)
    rows = checked_rows(prompt="What is the answer? " * 20)
    reports = [Report(COUNT), Report(COUNT)]
    one = tokenised(tmp_path / "one", rows, num_proc=1, report=reports[0])
    two = tokenised(tmp_path / "two", rows, num_proc=2, report=reports[1])
    assert same(one, two) and reports[0] == reports[1]


def test_the_slower_of_two_processes_takes_the_fasters_set(tmp_path, monkeypatch):
    write = cache._write

    def overtaken(*arguments):
        write(*arguments)
        monkeypatch.setattr(cache, "_write", write)
        fast.append(tokenised(tmp_path))

    fast: list[PairSet] = []
    monkeypatch.setattr(cache, "_write", overtaken)
    assert same(tokenised(tmp_path), fast[0]) and len(folders(tmp_path)) == 1


def tokenise_at_once(cache, ready, results):
    ready.wait()
    results.put(tokenised(cache).digest)


def test_two_processes_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, results = fork.Barrier(2), fork.Queue()
    both = [fork.Process(target=tokenise_at_once, args=(tmp_path, ready, results)) for _ in range(2)]
    for process in both:
        process.start()
    digests = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
    assert digests == {tokenised(tmp_path).digest} and len(folders(tmp_path)) == 1


def test_a_failed_tokenising_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenised(tmp_path)
    assert folders(tmp_path) == []


def shorten(path):
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = {
    "no manifest": ("manifest.json", lambda path: path.unlink()),
    "half a manifest": ("manifest.json", shorten),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text("[1]")),
    "a manifest without its numbers": ("manifest.json", lambda path: path.write_text("{}")),
    "no tokens": ("tokens.npy", lambda path: path.unlink()),
    "tokens cut short": ("tokens.npy", shorten),
    "an empty file": ("lengths.npy", lambda path: path.write_bytes(b"")),
    "fewer tokens": ("tokens.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "fewer rows": ("rows.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "no array": ("starts.npy", lambda path: path.write_text("none")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_set_says_which_folder_to_remove(damage, tmp_path):
    tokenised(tmp_path)
    (folder,) = folders(tmp_path)
    name, harm = DAMAGE[damage]
    harm(folder / name)
    with pytest.raises(UserError, match="remove it") as error:
        tokenised(tmp_path)
    assert str(folder) in str(error.value)


# ------------------------------------------------------------------------------------------- left out while tokenising


def with_long_prompts(long: int, of: int = 20):
    rows = [{"prompt": f"Question {n}:", "chosen": f" answer {n}", "rejected": f" no {n}"} for n in range(of)]
    for n in range(long):
        rows[2 * n + 1]["prompt"] *= 30
    return check_preferences(datasets.Dataset.from_list(rows))[0]


def test_pairs_without_room_are_left_out_and_counted(tmp_path):
    report = Report(20)
    pairs = tokenised(tmp_path, with_long_prompts(2), report=report, truncation="keep_start")
    assert len(pairs) == 18 and list(pairs.rows) == [0, 2, *range(4, 20)]
    assert report.left_out == {NO_ROOM: (2, [1, 3])} and report.kept == 18


def test_what_is_left_out_here_counts_towards_the_tenth(tmp_path):
    rows, keep_start = with_long_prompts(3), dict(truncation="keep_start")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"3 of 20 rows cannot be used: 3 x no room .* \(rows 1, 3, 5\)"):
            tokenised(tmp_path, rows, **keep_start)
    assert len(tokenised(tmp_path, rows, report=Report(20, max_left_out=0.15), **keep_start)) == 17
    earlier = Report(22, left_out={"a response is empty": (2, [20, 21])})
    with pytest.raises(UserError, match="4 of 22"):
        tokenised(tmp_path, with_long_prompts(2), report=earlier, **keep_start)


def test_nothing_left_stops(tmp_path):
    rows = with_long_prompts(5, of=10)
    with pytest.raises(UserError, match="10 of 10 rows cannot be used"):
        tokenised(tmp_path, rows, max_length=2, truncation="keep_start", report=Report(10, max_left_out=1.0))


# --------------------------------------------------------------------------------------------------- the held-out part


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """100 pairs, each prompt twice, in a file; the same in another order."""
    place = tmp_path_factory.mktemp("held-out")
    rows = [{"prompt": f"Question {n // 2}:", "chosen": f" answer {n}", "rejected": f" no {n}"} for n in range(100)]
    shuffled = np.random.default_rng(0).permutation(100)
    for name, order in {"rows": range(100), "shuffled": shuffled, "few": range(7)}.items():
        datasets.Dataset.from_list([rows[n] for n in order]).to_json(place / f"{name}.jsonl")
    return place


def parts(place, name="rows", **options) -> tuple[PairSet, PairSet]:
    words = {"model": "none", "dataset": place / f"{name}.jsonl", "cache_dir": place / "cache", "max_length": 64}
    argv = [f"--{key}={value}" for key, value in {**words, **options}.items()]
    return load_pairs(parse_options(argv), tokenizer(), from_environment())


def ids(pairs: PairSet) -> set[str]:
    return {pairs.pair_id(n) for n in range(len(pairs))}


def prompts(pairs: PairSet) -> set[bytes]:
    return {digest.tobytes() for digest in pairs.prompt_hashes}


def test_the_parts_are_the_whole_and_share_no_prompt(hundred, capsys):
    train, held = parts(hundred)
    assert (len(train), len(held)) == (94, 6), "a twentieth is 5, and a prompt has two pairs"
    assert not prompts(train) & prompts(held) and len(ids(train) | ids(held)) == 100
    assert f"{hundred}/rows.jsonl: 100 of 100 pairs are used" in capsys.readouterr().out


def test_the_parts_do_not_depend_on_the_order_of_the_rows(hundred):
    assert [ids(part) for part in parts(hundred)] == [ids(part) for part in parts(hundred, "shuffled")]


def test_the_number_of_held_out_pairs_may_be_said(hundred):
    assert [len(part) for part in parts(hundred, eval_pairs=20)] == [80, 20]
    assert [len(part) for part in parts(hundred, eval_pairs=0)] == [100, 0]


def test_a_set_of_its_own_for_evaluation(hundred):
    few = str(hundred / "few.jsonl")
    assert [len(part) for part in parts(hundred, eval_dataset=few)] == [100, 7]
    assert [len(part) for part in parts(hundred, eval_dataset=few, eval_pairs=3)] == [100, 3]
