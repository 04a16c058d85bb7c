"""Answers in batches are those of each prompt alone, and stop where they should."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.embedded import model_folder
from dpo_ds.reports.answers import GREEDY, Answers, Way

TEXTS = [
    "One day Lily and Max were near the old mill. Max was new there and knew nobody.",
    "Ben fell.",
    "It was a grey evening, and Ben was by the river with Sam.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def answers(tokenizer, **changes) -> Answers:
    return Answers(tokenizer, tokenizer.eos_token_id, 512, **changes)


def plain(prompt: list[int], end: int, tokens: int = 40) -> list[int]:
    """Greedy, a whole forward for each token."""
    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and (not ids[len(prompt) :] or ids[-1] != end):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_answers_as_each_prompt_alone(tokenizer, prompts):
    (batch,) = answers(tokenizer, tokens=40).of(model_folder(), prompts)
    for prompt, text in zip(prompts, batch, strict=True):
        wanted = tokenizer.decode(plain(prompt, tokenizer.eos_token_id), skip_special_tokens=True)
        assert text == " ".join(wanted.split()) and text


def test_an_answer_stops_at_the_token_that_answers_were_trained_to_end_with(tokenizer, prompts):
    first = plain(prompts[0], tokenizer.eos_token_id)
    ((stopped,),) = Answers(tokenizer, first[2], 512).of(model_folder(), prompts[:1])
    assert stopped == " ".join(tokenizer.decode(first[: first.index(first[2]) + 1]).split())


def test_samples_follow_from_the_seed(tokenizer, prompts):
    ways = [GREEDY, *(Way("sampled", 1.5, 0.99, seed) for seed in (1, 1, 2))]
    greedy, one, again, two = answers(tokenizer, tokens=30).of(model_folder(), prompts, ways=ways)
    assert one == again and one != two and one != greedy
    (alone,) = answers(tokenizer, tokens=30).of(model_folder(), prompts)
    assert alone == greedy


def test_a_temperature_near_0_is_greedy(tokenizer, prompts):
    greedy, cold = answers(tokenizer, tokens=20).of(model_folder(), prompts, ways=[GREEDY, Way("cold", 1e-4)])
    assert cold == greedy
