"""The policy on held-out pairs: its log-probabilities as a file, and answers before and after training."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from dpo_ds.data.pairs import PairSet
from dpo_ds.files import write_whole
from dpo_ds.ranks import console

ANSWER_TOKENS = 96
SHOWN = 240  # characters of a prompt or an answer on the terminal


def write_logps(file: Path, pairs: PairSet, policy: np.ndarray, reference: np.ndarray) -> None:
    """Writes a JSON line for each pair: its row in the data and its logps. policy and reference: [answers]."""
    policy, reference = policy[pairs.pairs], reference[pairs.pairs]
    lines = []
    for n in range(len(pairs)):
        facts = {
            "pair": pairs.pair_id(n),
            "row": int(pairs.rows[n]),
            "chosen": float(policy[n, 0]),
            "rejected": float(policy[n, 1]),
            "reference_chosen": float(reference[n, 0]),
            "reference_rejected": float(reference[n, 1]),
        }
        lines.append(json.dumps(facts) + "\n")
    write_whole(file, "".join(lines))


@dataclass(frozen=True)
class Answers:
    """Generates answers greedily with plain transformers."""

    tokenizer: PreTrainedTokenizerBase
    end: int  # the token that answers were trained to end with
    context: int | None  # the most positions that the model supports
    trust_remote_code: bool = False

    def of(self, folder: Path, prompts: list[list[int]], adapter: Path | None = None) -> list[str]:
        """The answers of the model in `folder`, with a peft adapter, to prompts of token ids, as text."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=self.trust_remote_code, use_safetensors=True
        ).to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides its self
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[operator]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        # Not the model's own config, which may ask for sampling, or for what generate refuses.
        model.generation_config = GenerationConfig(
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            eos_token_id=sorted({self.end, self.tokenizer.eos_token_id, *ends}),
        )
        texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            left = (self.context or len(prompt) + ANSWER_TOKENS) - len(prompt)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max(1, min(ANSWER_TOKENS, left)),
                )
            texts.append(" ".join(_text(self.tokenizer, out[0, len(prompt) :].tolist()).split()))
        del model
        gc.collect()
        return texts


def show_generations(
    file: Path, answers: Answers, prompts: list[list[int]], before: Path, after: Path, adapter: Path | None = None
) -> None:
    """Answers a few held-out prompts with the model `before` training, with the adapter that it began from, and with
    the merged one `after`. Prints both answers and writes them to `file` as Markdown. Loads one model after the
    other."""
    old_answers, new_answers = answers.of(before, prompts, adapter), answers.of(after, prompts)
    text = ["# Before and after", ""]
    for prompt, old, new in zip(prompts, old_answers, new_answers, strict=True):
        shown = _text(answers.tokenizer, prompt).strip()
        text += [f"**Prompt** {shown}", "", f"**Before** {old}", "", f"**After** {new}", "", "---", ""]
        console.say(f"prompt: {_end_of(shown)}\n  before: {old[:SHOWN]}\n  after:  {new[:SHOWN]}")
    write_whole(file, "\n".join(text))


def _end_of(prompt: str) -> str:
    """The end of a prompt, for the terminal; generations.md has the whole prompt."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else f"… {line[-SHOWN:]}"


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)  # a list of texts is for a list of lists
    return text
