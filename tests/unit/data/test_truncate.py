"""--truncation: what a prompt and its answers lose, and what they keep; which pairs and answers are left after it."""

import numpy as np
import pytest
import templates

from dpo_ds.data.chat import FOLDED
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.encoded import EQUAL_NOW, NO_ROOM, Encoded
from dpo_ds.data.encoder import Encoder, Tokenizing
from dpo_ds.data.truncate import room
from dpo_ds.errors import UserError

CHATML, LLAMA_3, PLAIN = "stabilityai/stablelm-2-1_6b-chat", "meta-llama/Meta-Llama-3-8B-Instruct", "gpt2"
GEMMA = "google/gemma-7b-it"
LONG = 10**6
ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def chat(*turns: str) -> list[dict]:
    """ "a: Hi" is the assistant's message Hi."""
    return [{"role": ROLES[turn[0]], "content": turn[3:]} for turn in turns]


def row(prompt: list[dict], *answers: str, pairs=None, **more) -> Comparison:
    pairs = [Preference(0, n) for n in range(1, len(answers))] if pairs is None else pairs
    return Comparison(prompt, [Answer(chat(f"a: {text}")) for text in answers], pairs, **more)


def encode(model: str, comparison: Comparison, max_length: int = LONG, **options) -> Encoded:
    (encoded,) = Encoder(templates.tokenizer(model), Tokenizing(max_length, **options)).encode([comparison])
    return encoded


def length(model: str, text: str) -> int:
    return len(templates.tokenizer(model)(text, add_special_tokens=False)["input_ids"])


def text_of(model: str, encoded: Encoded) -> str:
    return templates.tokenizer(model).decode(encoded.prompt)


# ------------------------------------------------------------------------------------------------- how many tokens each


def slow_room(prompt: int, answer: int, limit: int, least: int) -> tuple[int, int]:
    """Token by token: the answer gives way while the prompt has not its least, then the prompt does."""
    kept = prompt
    while kept + answer > limit and answer > limit - min(prompt, least):
        answer -= 1
    while kept + answer > limit:
        kept -= 1
    return kept, answer


@pytest.mark.parametrize("least", [None, 1, 3, 11])
def test_keep_question_shares_the_length_as_the_slow_version_does(least):
    for limit in (2, 3, 12, 20):
        if least is not None and least >= limit:
            continue
        for prompt in range(1, 30):
            for answer in range(1, 30):
                found = room("keep_question", limit, least, prompt, answer)
                kept = slow_room(prompt, answer, limit, limit // 2 if least is None else least)
                assert (min(prompt, found.prompt), min(answer, found.answer)) == kept
                assert sum(kept) <= limit and min(kept) >= 1


def test_a_least_that_leaves_no_room_for_an_answer_is_refused():
    with pytest.raises(UserError, match="--min_prompt_tokens is 64, but must be from 1 to below --max_length, 64"):
        Encoder(templates.tokenizer(PLAIN), Tokenizing(64, min_prompt_tokens=64))


# ---------------------------------------------------------------------------------------------------------- the answers

SEA = "Tell me about the sea. " * 10


def test_case_08_keeps_the_prompt_and_cuts_the_long_answer():
    comparison = row(chat("s: You are a pirate.", f"u: {SEA}"), "Arr, the sea is wide.", "blah word " * 600)
    whole, cut = encode(CHATML, comparison), encode(CHATML, comparison, 1024)
    assert cut.prompt == whole.prompt and cut.answers[0] == whole.answers[0]
    assert cut.answers[1] == whole.answers[1][: 1024 - len(whole.prompt)]
    assert cut.cut_answers == [0, len(whole.answers[1]) - len(cut.answers[1])] and cut.cut_prompt == 0
    assert cut.changed == [] and cut.cut_prompt == 0 < max(cut.cut_answers)
    (before,) = Encoder(templates.tokenizer(CHATML), Tokenizing(1024, "keep_end")).encode([comparison])
    assert len(before.prompt) == 1, "the negative control: what the form is about"


def test_all_answers_are_cut_alike():
    comparison = row(chat("u: Hi"), "b " * 90, "c " * 50, "d " * 70, "e")
    whole, cut = encode(CHATML, comparison), encode(CHATML, comparison, 60)
    limit = 60 - len(whole.prompt)
    assert cut.prompt == whole.prompt and cut.answers == [answer[:limit] for answer in whole.answers]
    assert cut.cut_answers == [max(0, len(answer) - limit) for answer in whole.answers]


def test_min_prompt_tokens_says_what_the_prompt_keeps():
    comparison = row(chat(f"u: {SEA}"), "b " * 200, "c " * 200)
    whole = encode(CHATML, comparison)
    assert len(whole.prompt) > 100
    for least, kept in ((None, 60), (20, 20), (90, 90), (119, 119)):
        cut = encode(CHATML, comparison, 120, min_prompt_tokens=least)
        assert (len(cut.prompt), len(cut.answers[0])) == (min(kept, len(whole.prompt)), 120 - len(cut.prompt))


def test_what_need_not_be_cut_is_what_the_other_ways_give():
    comparison = row(chat("s: Be kind.", f"u: {SEA}", "a: No.", "u: Please"), "Yes.", "No, no.")
    whole = encode(CHATML, comparison)
    limit = len(whole.prompt) + max(map(len, whole.answers))
    for truncation in ("keep_question", "keep_end", "keep_start"):
        assert encode(CHATML, comparison, limit, truncation=truncation) == whole
        assert encode(CHATML, comparison, limit - 1, truncation=truncation) != whole


# ----------------------------------------------------------------------------------------------------------- the prompt

TURNS = ["u: First question", "a: First answer", "u: Second question", "a: Second answer", "u: Third question"]
OPEN = "<|im_start|>assistant\n"
SAID = {"s": "system", "u": "user", "a": "assistant"}


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{SAID[turn[0]]}\n{turn[3:]}<|im_end|>\n" for turn in turns) + OPEN


# what is left of the prompt, by the most tokens it may take: those of a text, and what they hold
LEFT = {
    "all": (["s: Be kind.", *TURNS], ["s: Be kind.", *TURNS]),
    "without the first turn": (["s: Be kind.", *TURNS], ["s: Be kind.", *TURNS[2:]]),
    "without the first two": (["s: Be kind.", *TURNS], ["s: Be kind.", *TURNS[4:]]),
    "no system message": (TURNS, TURNS[2:]),
    "a first answer before any question": (TURNS[1:], TURNS[2:]),
}


@pytest.mark.parametrize("case", LEFT)
def test_the_oldest_turns_go_first_and_the_system_message_stays(case):
    given, left = LEFT[case]
    comparison, answer = row(chat(*given), "Yes.", "No."), length(CHATML, "Yes.<|im_end|>")
    need = length(CHATML, chatml(*left)) + answer
    for limit in (need, need + 1):
        cut = encode(CHATML, comparison, limit)
        assert text_of(CHATML, cut) == chatml(*left)
        assert cut.cut_prompt == length(CHATML, chatml(*given)) - len(cut.prompt)
        assert (cut.cut_prompt > 0) == (given != left) and not any(cut.cut_answers)
    assert text_of(CHATML, encode(CHATML, comparison, need - 1)) != chatml(*left)


def test_of_many_turns_as_many_stay_as_fit():
    given = [turn for n in range(40) for turn in (f"u: Question {n}", f"a: Answer {n}")] + ["u: And?"]
    lengths = [length(CHATML, chatml(*given[start:])) for start in range(0, len(given), 2)]
    answer = length(CHATML, "Yes.<|im_end|>")
    for limit in range(60, lengths[0] + answer, 37):
        cut = encode(CHATML, row(chat(*given), "Yes.", "No."), limit)
        assert len(cut.prompt) == max(n for n in lengths if n + answer <= limit)


def test_the_middle_of_a_last_turn_that_is_too_long_goes():
    text = " ".join(f"w{n}" for n in range(60))
    comparison = row(chat("s: Be kind.", "u: Old", "a: Older", f"u: {text}"), "Yes.", "No.")
    cut = encode(CHATML, comparison, 120)
    prompt = text_of(CHATML, cut)
    head, tail = chatml("s: Be kind.", "u: w0 w1 w2").removesuffix(f"<|im_end|>\n{OPEN}"), f"w58 w59<|im_end|>\n{OPEN}"
    assert prompt.startswith(head) and prompt.endswith(tail) and len(cut.prompt) + len(cut.answers[0]) == 120
    assert "Old" not in prompt and "w30" not in prompt
    kept = prompt.removeprefix(head).removesuffix(tail)
    assert text.startswith("w0 w1 w2" + kept[:10]) and text.endswith(kept[-10:] + "w58 w59"), "as much of each end"


def test_the_longest_message_of_the_last_turn_is_cut():
    comparison = row(chat("u: What is it?", "a: Let me look.", "t: " + "blue " * 99), "Blue.", "Red.")
    prompt = text_of(CHATML, encode(CHATML, comparison, 100))
    assert prompt.startswith("<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nLet me look.<|im_end|>\n")
    assert prompt.endswith(f"blue <|im_end|>\n{OPEN}")


def test_a_system_message_stays_whole_though_it_is_the_longest():
    comparison = row(chat("s: " + "kind " * 30, "u: " + "sea " * 20), "Yes.", "No.")
    whole = encode(CHATML, comparison)
    limit = len(whole.prompt) + len(whole.answers[0]) - 10
    prompt = text_of(CHATML, encode(CHATML, comparison, limit, min_prompt_tokens=limit - 10))
    assert prompt.startswith(f"<|im_start|>system\n{'kind ' * 30}<|im_end|>\n") and 0 < prompt.count("sea") < 20


@pytest.mark.parametrize("model", [CHATML, LLAMA_3, GEMMA])
def test_a_system_message_that_is_too_long_itself_loses_its_middle(model):
    comparison = row(chat("s: " + "kind " * 99, "u: Hi"), "Yes.", "No.")
    tok, cut = templates.tokenizer(model), encode(model, comparison, 60)
    whole = encode(model, comparison)
    assert len(cut.prompt) + max(map(len, cut.answers)) == 60
    assert cut.prompt[:20] == whole.prompt[:20] and cut.prompt[-20:] == whole.prompt[-20:]
    assert "Hi" in tok.decode(cut.prompt)


@pytest.mark.parametrize("limit", [2, 3, 4, 9])
def test_bos_stays_as_long_as_another_token_does(limit):
    tok = templates.tokenizer(LLAMA_3)
    cut = encode(LLAMA_3, row(chat(f"u: {SEA}"), "Yes.", "No."), limit)
    whole = encode(LLAMA_3, row(chat(f"u: {SEA}"), "Yes.", "No."))
    assert cut.prompt[-1] == whole.prompt[-1] and (cut.prompt[0] == tok.bos_token_id) == (len(cut.prompt) > 1)


def test_plain_dialogues_lose_whole_turns_too():
    head, *turns = "\n\nSystem: Be kind.", "\n\nHuman: One?\n\nAssistant: One.", "\n\nHuman: Two?\n\nAssistant:"
    messages = chat("s: Be kind.", "u: One?", "a: One.", "u: Two?")
    answers = [Answer(chat("a: Yes."), " Yes."), Answer(chat("a: No."), " No.")]
    for text in (head + "".join(turns), None):
        comparison = Comparison(messages, answers, [Preference(0, 1)], text)
        whole = encode(PLAIN, comparison)
        cut = encode(PLAIN, comparison, len(whole.prompt) + len(whole.answers[0]) - 1)
        assert text_of(PLAIN, cut) == head + turns[1] and cut.answers == whole.answers


def test_a_plain_text_keeps_both_ends():
    comparison = Comparison(chat("u: x"), [Answer(chat("a: y"), t) for t in (" Yes.", " No.")], [Preference(0, 1)],
                            "Summarise: " + "word " * 99 + "TL;DR:")  # fmt: skip
    prompt = text_of(PLAIN, encode(PLAIN, comparison, 40))
    assert prompt.startswith("Summarise: word") and prompt.endswith("word TL;DR:")


def test_a_rendered_text_keeps_both_ends():
    text = chatml("s: Be kind.", "u: " + "word " * 99)
    answers = [Answer(chat("a: y"), t) for t in ("Yes.<|im_end|>", "No.<|im_end|>")]
    prompt = text_of(CHATML, encode(CHATML, Comparison([], answers, [Preference(0, 1)], text, rendered=True), 80))
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n") and prompt.endswith(f"word <|im_end|>\n{OPEN}")


def filled(cut: Encoded, whole: list[int]) -> list[int]:
    """The prompt with tokens of the whole one put in where it has gaps."""
    prompt, back = [], 0
    for at, tokens in cut.gaps:
        prompt += cut.prompt[back:at]
        prompt += whole[len(prompt) : len(prompt) + tokens]
        back = at
    return prompt + cut.prompt[back:]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_the_gap_of_the_other_ways_is_at_the_beginning_or_the_end(truncation):
    comparison = row(chat("s: Be kind.", f"u: {SEA}"), "Yes.", "No.")
    whole, cut = (encode(LLAMA_3, comparison, limit, truncation=truncation) for limit in (LONG, 70))
    assert cut.gaps == [(1 if truncation == "keep_end" else 70, cut.cut_prompt)] or not cut.answers
    assert cut.left_out or filled(cut, whole.prompt) == whole.prompt


@pytest.mark.parametrize("model", [*templates.SHAPES, *templates.OTHERS])
def test_whatever_the_dialogue_the_length_holds_and_the_end_stays(model):
    generator = np.random.default_rng(0)

    def words() -> str:
        return " ".join(generator.choice(["sea", "ship", "wide", "né", "Tell me"], generator.integers(1, 40)))

    cuts = 0
    for _ in range(30):
        turns = 2 * int(generator.integers(0, 3)) + 1
        prompt = [{"role": ("user", "assistant")[n % 2], "content": words()} for n in range(turns)]
        prompt = (chat("s: Be kind.") if generator.random() < 0.5 else []) + prompt
        comparison = row(prompt, "b" + words(), "c" + words(), "d" + words())
        limit = int(generator.integers(24, 90))
        whole, cut = encode(model, comparison, date="2026-11-26"), encode(model, comparison, limit, date="2026-11-26")
        assert not cut.left_out and len(cut.prompt) + max(map(len, cut.answers)) <= limit
        assert cut.prompt[-1] == whole.prompt[-1]
        assert all(answer == full[: len(answer)] for answer, full in zip(cut.answers, whole.answers, strict=True))
        assert cut.cut_prompt == len(whole.prompt) - len(cut.prompt)
        assert cut.cut_answers == [
            len(full) - len(answer) for answer, full in zip(cut.answers, whole.answers, strict=True)
        ]
        assert filled(cut, whole.prompt) == whole.prompt or FOLDED in cut.changed
        cuts += cut.cut_prompt > 0
    assert cuts > 5


# ------------------------------------------------------------------------------------------------ pairs that are left

SAME = "the same beginning "


def test_pairs_whose_answers_are_equal_once_cut_are_dropped():
    """0 and 3 are equal once cut, and 3 is in no other pair."""
    pairs = [Preference(0, 1, weight=2.0), Preference(0, 3), Preference(2, 0, margin=0.5)]
    answers = [SAME * 20 + "a", "no", "go", SAME * 20 + "b"]
    cut = encode(CHATML, row(chat("u: Hi"), *answers, pairs=pairs), 60)
    whole = encode(CHATML, row(chat("u: Hi"), *answers, pairs=pairs))
    assert cut.pairs == [Preference(0, 1, weight=2.0), Preference(2, 0, margin=0.5)]
    assert cut.answers == [answer[: 60 - len(cut.prompt)] for answer in whole.answers[:3]]
    assert len(cut.scored) == len(cut.cut_answers) == 3


def test_a_row_with_no_pair_left_is_left_out():
    cut = encode(CHATML, row(chat("u: Hi"), SAME * 20 + "a", SAME * 20 + "b"), 60)
    assert cut.left_out == EQUAL_NOW and not cut.answers and not cut.pairs


def test_a_dialogue_whose_assistant_is_cut_away_is_left_out():
    answer = Answer(chat("u: " + "word " * 99, "a: Yes."))
    comparison = Comparison(chat("u: Hi", "a: Ho"), [answer, Answer(chat("u: Go", "a: No."))], [Preference(0, 1)])
    assert encode(CHATML, comparison, 60).left_out == NO_ROOM


def test_answers_that_no_pair_uses_are_left_off():
    comparison = row(chat("u: Hi"), "Yes.", "Go.", "No.", pairs=[Preference(2, 0)])
    encoded, expected = encode(CHATML, comparison), encode(CHATML, row(chat("u: Hi"), "Yes.", "No."))
    assert encoded.answers == expected.answers and encoded.pairs == [Preference(1, 0)]


def test_a_comparison_without_pairs_keeps_its_answers():
    encoded = encode(CHATML, row(chat("u: Hi"), "b " * 99, "Go.", pairs=[]), 60)
    assert len(encoded.answers) == 2 and encoded.pairs == [] and not encoded.left_out
