"""What the policy does with held-out prompts: its log-probabilities as a file, and its answers before and after."""

import gc
import json

import torch

from dpo_ds import world
from dpo_ds.checkpoint import write_whole

ANSWER_TOKENS = 96
SHOWN = 240  # characters of a prompt or an answer on the terminal


def write_logps(run, eval_logps, eval_reference) -> None:
    """evaluation.jsonl: each held-out pair, its row in the data, and the final policy's and the reference's logps."""
    if not world.from_environment().speaks:
        return
    lines = []
    for n in range(len(run.eval_pairs)):
        policy, reference = eval_logps[n].tolist(), eval_reference[n].tolist()
        facts = {
            "pair": run.eval_pairs.pair_id(n),
            "row": int(run.eval_pairs.rows[n]),
            "chosen": policy[0],
            "rejected": policy[1],
            "reference_chosen": reference[0],
            "reference_rejected": reference[1],
        }
        lines.append(json.dumps(facts) + "\n")
    write_whole(run.folder / "evaluation.jsonl", "".join(lines))


def show_generations(run) -> None:
    """Greedy answers to a few held-out prompts, of the model as it came and of the merged checkpoint, side by side:
    printed, and kept as generations.md. Rank 0 loads both in plain transformers, one after the other."""
    count = min(run.options.generations, len(run.eval_pairs))
    merged = run.folder / "merged"
    if not world.from_environment().speaks or count == 0 or not merged.is_dir():
        return
    prompts = [run.eval_pairs.pair(n)[0].tolist() for n in range(count)]
    before = answers(run.weights, prompts, run)
    after = answers(merged, prompts, run)
    text = ["# Before and after", ""]
    for prompt, old, new in zip(prompts, before, after, strict=True):
        shown = run.tokenizer.decode(prompt, skip_special_tokens=True).strip()
        text += [f"**Prompt** {shown}", "", f"**Before** {old}", "", f"**After** {new}", "", "---", ""]
        world.say(f"prompt: {_end_of(shown)}\n  before: {old[:SHOWN]}\n  after:  {new[:SHOWN]}")
    write_whole(run.folder / "generations.md", "\n".join(text))


def _end_of(prompt: str) -> str:
    """What a terminal has room for; generations.md has the whole."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else f"… {line[-SHOWN:]}"


def answers(folder, prompts: list[list[int]], run) -> list[str]:
    """Greedy continuations of token-id prompts, as text."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=run.options.trust_remote_code, use_safetensors=True
    ).to(device)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        room = (run.model.context or len(prompt) + ANSWER_TOKENS) - len(prompt)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(1, min(ANSWER_TOKENS, room)),
                do_sample=False,
                pad_token_id=run.tokenizer.eos_token_id,
                eos_token_id=sorted(_ends(run.tokenizer, model)),
            )
        texts.append(" ".join(run.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).split()))
    del model
    gc.collect()
    return texts


def _ends(tokenizer, model) -> set[int]:
    """EOS, and whatever the model's own generation config stops at (an end-of-turn token)."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}
