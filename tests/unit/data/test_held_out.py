"""Held out means held out: no prompt, and no variant of one, is on both sides."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.held_out import KEYS, families, held_out, prompt_hash, prompt_keys, shared


def comparison(text, implicit=False, messages=None) -> Comparison:
    return Comparison(
        messages or [{"role": "user", "content": text}], [Answer([]), Answer([])], [Preference(0, 1)], text,
        implicit=implicit,
    )  # fmt: skip


def keys(*comparisons) -> np.ndarray:
    """Their keys; a prompt's token ids are its letters' numbers, blanks at its ends left out as templates do."""
    found = [prompt_keys(c, c.text, [ord(letter) for letter in c.text.strip()]) for c in comparisons]
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, KEYS, 16)


def hashes(prompts) -> np.ndarray:
    return np.frombuffer(b"".join(prompt_hash(str(prompt)) for prompt in prompts), dtype=np.uint8).reshape(-1, 16)


def held(prompts, **options) -> set:
    prompts = list(prompts)
    family = families(keys(*(comparison(str(prompt)) for prompt in prompts)))
    mask = held_out(hashes(prompts), family, np.ones(len(prompts), dtype=np.int64), **options)
    return {prompt for prompt, held in zip(prompts, mask, strict=True) if held}


@pytest.mark.parametrize(("pairs", "count"), [(2, 1), (20, 1), (100, 5), (1000, 50), (20_000, 500)])
def test_a_twentieth_is_held_out_and_five_hundred_at_most(pairs, count):
    assert len(held(range(pairs))) == count


def test_so_many_as_asked_for():
    assert len(held(range(200), fraction=1.0, most=30)) == 30


def test_one_prompt_is_never_held_out_and_of_two_never_both():
    assert held(["one"]) == set() and len(held(["one", "two"], fraction=1.0)) == 1


def test_the_choice_follows_from_the_prompts_alone():
    assert held(range(200)) == held(reversed(range(200)))
    assert held(range(200)) <= held(range(200), fraction=0.2)


VARIANTS = {
    "blanks at the end": ("Item 0?", "Item 0? \n"),
    "blanks within": ("Item  0?", "Item 0?"),
    "case": ("What IS it?", "what is it?"),
    "Unicode's normal forms": ("Où est le café?", "Ou\u0300 est le cafe\u0301?"),
    "another form of a letter": ("What is ﬁne?", "What is fine?"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_prompt_are_one_family(name):
    one, other = VARIANTS[name]
    first, second, third = families(keys(comparison(one), comparison(other), comparison("another")))
    assert first == second != third


def test_implicit_prompts_are_one_family_if_they_ask_the_same():
    """Where such a prompt ends is decided by the answers."""
    asked = "Q: what is item 0?\nA:"
    found = families(
        keys(
            comparison(asked, implicit=True),
            comparison(asked + " It is", implicit=True),
            comparison(asked + " It was", implicit=True),
            comparison("Q: what is item 1?\nA: It is", implicit=True),
            comparison("What is it? It is", implicit=True),
            comparison("What is it?  It was", implicit=True),
        )
    )
    assert found[0] == found[1] == found[2] and found[4] == found[5] and len(set(found)) == 3


def test_an_implicit_dialogue_asks_what_its_last_user_asks():
    def chat(*contents):
        return [
            {"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)
        ]

    one, two, three = (
        comparison(" ".join(contents), True, chat(*contents))
        for contents in (("a", "b", "why?"), ("a", "c", "Why? "), ("a", "b", "how?"))
    )
    first, second, third = families(keys(one, two, three))
    assert first == second != third


def said(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


FOUND_AND_GIVEN = {
    "a text": (("Say why. What is it? It", None), "Say why.  What is it?", None),
    "a text with an open line": (("Q: what is item 0?\nA: It", None), "Q: what is item 0?\nA:", None),
    "a dialogue that forks after its first turn": (
        ("\n\nHuman: Well. Why?\n\nAssistant:", said("Well. Why?")), "well. why?", None
    ),
    "a dialogue that forks later": (("a b Why?", said("a", "b", "Why?")), "x y why?", said("x", "y", "why?")),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND_AND_GIVEN)
def test_a_prompt_that_was_found_is_one_family_with_one_that_is_given(name):
    (text, messages), other, others = FOUND_AND_GIVEN[name]
    forked = [Answer(said("a", "b")), Answer(said("c"))]
    found = replace(comparison(text, True, messages), **({"answers": forked} if messages else {}))
    first, second, third = families(keys(found, comparison(other, False, others), comparison("How?")))
    assert first == second != third
    (both,) = shared(keys(comparison(other, False, others)), keys(found))
    assert both


def test_prompts_that_are_given_are_two_if_only_their_last_turns_are_equal():
    one, other = (comparison(f"{start} b Why?", False, said(start, "b", "Why?")) for start in "ax")
    lines = [comparison(f"Read this.\n{name}?") for name in ("one", "two")]
    assert len({*families(keys(one, other, *lines))}) == 4


def test_families_join_over_any_of_the_keys_and_over_others():
    numbers = np.zeros((5, 3, 16), dtype=np.uint8)
    numbers[:, :2] = np.arange(1, 11).reshape(5, 2)[..., None]
    numbers[1, 0], numbers[2, 1] = numbers[0, 0], numbers[1, 1]  # 0-1 by the first key, 1-2 by the second
    numbers[3:, 2] = 77  # 3-4 by the third
    assert list(families(numbers)) == [0, 0, 0, 3, 3]
    assert list(shared(numbers[:2], numbers[2:3])) == [True, True] and not shared(numbers[:2], numbers[3:]).any()


def test_a_family_is_held_out_whole():
    prompts = [f"{'item' if n % 2 else 'ITEM'} {n // 2}" for n in range(400)]
    chosen = held(prompts)
    assert {prompt.lower() for prompt in chosen} & {p.lower() for p in set(prompts) - chosen} == set()
    assert 20 <= len(chosen) <= 21


def test_a_turn_that_many_prompts_end_with_is_not_what_they_ask():
    """Trajectories that fork after a common "Go on." are about what was asked before."""
    forked = [Answer(said("a", "b")), Answer(said("c"))]
    many = [
        replace(comparison(f"{n} b Go on.", True, said(f"Fix router {n}", "b", "Go on.")), answers=forked)
        for n in range(40)
    ]
    assert len(set(families(keys(*many)))) == 40
    assert len(set(families(keys(*many[:5])))) == 1, "few of them may be one conversation"
