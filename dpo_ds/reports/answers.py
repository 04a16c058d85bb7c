"""Answers to prompts with plain transformers: greedy and sampled, several prompts at a time."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from dpo_ds.models import generation

ANSWER_TOKENS = 96
BATCH = 8  # prompts


@dataclass(frozen=True)
class Way:
    """A way to generate: the likeliest token each time, or one that is drawn."""

    name: str
    temperature: float | None = None  # None: greedy
    top_p: float = 1.0
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers' generate takes."""
        if self.temperature is None:
            return {"do_sample": False}
        # top_k 0: generate would otherwise take the 50 likeliest tokens alone.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


GREEDY = Way("greedy")


@dataclass(frozen=True)
class Answers:
    """Generates answers with plain transformers."""

    tokenizer: PreTrainedTokenizerBase
    end: int  # the token that answers were trained to end with
    context: int | None  # the most positions that the model supports
    trust_remote_code: bool = False
    tokens: int = ANSWER_TOKENS  # of an answer, at most

    def of(
        self, folder: Path, prompts: list[list[int]], adapter: Path | None = None, ways: Sequence[Way] = (GREEDY,)
    ) -> list[list[str]]:
        """The answers of the model in `folder`, with a peft adapter, to prompts of token ids, as text in one line: a
        list for each way, in the prompts' order."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=self.trust_remote_code, use_safetensors=True
        ).to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides its self
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[operator]
        ends = sorted({self.end, self.tokenizer.eos_token_id, *generation.ends_of_config(model.generation_config)})
        texts = []
        for way in ways:
            # Not the model's own config, which may ask for sampling, or for what generate refuses.
            model.generation_config = GenerationConfig(
                pad_token_id=self.tokenizer.eos_token_id, eos_token_id=ends, **way.settings
            )
            torch.manual_seed(way.seed)
            texts.append(self._texts(model, prompts))
        del model
        gc.collect()
        return texts

    def _texts(self, model: Any, prompts: list[list[int]]) -> list[str]:
        """In batches of prompts of about the same length."""
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for n, answer in zip(batch, self._generated(model, [prompts[n] for n in batch]), strict=True):
                texts[n] = " ".join(text_of(self.tokenizer, answer).split())
        return texts

    def _generated(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens that follow each prompt. Shorter prompts are padded on the left, where attention is masked."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        left = (self.context or longest + self.tokens) - longest
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max(1, min(self.tokens, left)),
            )
        return out[:, longest:].tolist()


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)  # a list of texts is for a list of lists
    return text
