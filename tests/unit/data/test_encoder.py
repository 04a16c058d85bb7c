"""Comparisons as token ids: chat templates, where an answer begins and ends, truncation."""

import numpy as np
import pytest
from byte_tokenizer import SENTENCES, tokenizer

from dpo_ds.data.chat import BLANKS, FOLDED, REWRITTEN
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.encoded import EQUAL_NOW, NO_ROOM, Encoded
from dpo_ds.data.encoder import MOVED, Encoder, Tokenizing
from dpo_ds.data.template import REFUSED
from dpo_ds.errors import UserError

LONG = 10**6


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
    """Whatever the tokenizer adds, there is one BOS, only responses end with EOS, and no other token changes."""
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
# name: (tokenizer, prompt, what precedes the answer in the response, what ends the response)
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
    (pair,) = encode(tok, row(ASK, "It is here.", "No."))
    assert texts(tok, pair) == (prompt, f"{before}It is here.{end}", f"{before}No.{end}")
    assert not pair.changed and not pair.left_out
    for response in pair.answers:
        assert (pair.prompt + response).count(tok.bos_token_id) == prompt.count(tok.bos_token or "no BOS")
        whole = tok(prompt + tok.decode(response), add_special_tokens=False)["input_ids"]
        assert pair.prompt + response == whole


@pytest.mark.parametrize("shape", ["Llama-3", "ChatML, as Qwen2", "Gemma", "Phi-3"])
def test_an_answer_keeps_the_blanks_at_its_ends_or_the_report_counts_them(shape):
    make, _, _, end = SHAPES[shape]
    (pair,) = encode(tok := make(), row(ASK, "    return 1\n", "No."))
    trims = shape in ("Llama-3", "Gemma")
    assert texts(tok, pair)[1] == ("return 1" if trims else "    return 1\n") + end
    assert pair.changed == ([BLANKS] if trims else [])


def test_a_multi_turn_prompt_is_rendered_whole():
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Sing")]
    (pair,) = encode(
        tok := SHAPES["Gemma"][0](), row(messages=[{"role": role, "content": text} for role, text in turns])
    )
    said = "".join(f"<start_of_turn>{'model' if r == 'assistant' else r}\n{t}<end_of_turn>\n" for r, t in turns)
    assert texts(tok, pair)[0] == f"<bos>{said}<start_of_turn>model\n"


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sing"}]


def test_a_system_role_that_the_template_refuses_goes_into_the_first_user_turn_and_is_counted():
    (pair,) = encode(tok := SHAPES["Gemma"][0](), row(ASK, "It is here.", "No.", SYSTEM))
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
    """ "answ" and "er" are one token, so the prompt of both responses ends before it."""
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
    (pair,) = encode(tok := tokenizer(thinking, *CHATML_TOKENS), row("Hi", "It is here.", "No."))
    prompt, chosen, rejected = texts(tok, pair)
    assert prompt + chosen == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nIt is here.<|im_end|>"
    assert prompt + rejected == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"
    assert pair.changed == [REWRITTEN]


def test_prompt_and_response_are_the_tokens_of_the_whole_text_wherever_it_is_split():
    """At random splits of a text, prompt + response has the tokens of the whole text. The prompt's tokens are the first
    of those that it has alone."""
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
    """Drops prompt tokens one by one from the left until the longer response fits, then the responses' last tokens."""
    prompt, responses = list(prompt), [list(chosen), list(rejected)]
    while len(prompt) > 1 and len(prompt) + max(map(len, responses)) > limit:
        del prompt[1 if prompt[0] == bos and len(prompt) > 2 else 0]  # BOS goes when one other is left
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
            lost = [len(before) - len(after) for before, after in zip(full, parts_of(cut), strict=True)]
            assert [cut.cut_prompt, *cut.cut_answers] == lost
            seen |= {"prompt cut"} if lost[0] else set()
            seen |= {"answer cut"} if any(lost[1:]) else set()
    assert seen == ({"", "prompt cut", "answer cut", EQUAL_NOW} if slow is slow_keep_end else
                    {"", "answer cut", EQUAL_NOW, NO_ROOM})  # fmt: skip


def test_the_smallest_max_length_keeps_a_token_of_each():
    """The prompt keeps its last token, so BOS goes too."""
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
