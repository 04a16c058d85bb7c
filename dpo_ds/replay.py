"""Scores the pairs of a step whose loss or gradients were not finite, one by one: which of them is it?

    python -m dpo_ds.replay runs/x/bad_steps/step-000012.json

It takes the weights of the newest checkpoint that the run had then, or the model's own, and runs in one process.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.ranks import console

if TYPE_CHECKING:  # --help must not wait for these imports
    from dpo_ds.data.pairs import Group
    from dpo_ds.runs.bad_steps import BadPair, BadStep
    from dpo_ds.scoring.scorer import Scorer


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a run's bad_steps/step-….json")
    arguments = parser.parse_args(argv)
    from dpo_ds.runs.bad_steps import read

    replay(read(arguments.file))


def replay(bad: "BadStep") -> int:
    """Prints a line for each pair. Returns how many are not finite."""
    from dpo_ds.errors import UserError
    from dpo_ds.export import export_checkpoint
    from dpo_ds.models.files import fetch_weights
    from dpo_ds.models.find import find_model

    console.say(f"step {bad.step}: loss {bad.loss}, gradient norm {bad.grad_norm}, {len(bad.pairs)} pairs")
    with tempfile.TemporaryDirectory() as place:
        if bad.checkpoint is None:
            folder, what = (
                fetch_weights(find_model(bad.options.model, bad.options.trust_remote_code)),
                bad.options.model,
            )
        elif not Path(bad.checkpoint).is_dir():
            raise UserError(f"the checkpoint {bad.checkpoint} is gone: put it back, or remove its name from the file")
        else:
            with console.working("reading the checkpoint"):
                folder, what = export_checkpoint(Path(bad.checkpoint), Path(place) / "weights"), bad.checkpoint
        scorer = _scorer(folder, bad)
        console.say(f"weights: {what}")
        console.say(f"{'pair':24s}  tokens  log p chosen  log p rejected  gradient norm")
        broken = sum([not _score(scorer, pair) for pair in bad.pairs])
    if broken:
        console.say(f"{broken} pairs are not finite with these weights: look at them, or leave them out of the data")
    else:
        console.say("every pair is finite with these weights: what broke them came later; lower --learning_rate")
    return broken


def _scorer(folder: Path, bad: "BadStep") -> "Scorer":
    from transformers import AutoModelForCausalLM

    from dpo_ds.models.model import torch_dtype
    from dpo_ds.scoring import attention
    from dpo_ds.scoring.rotary import fix_frequencies
    from dpo_ds.scoring.scorer import Scorer

    assert bad.options.max_length is not None, "a run's options are decided"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch_dtype(bad.options.precision),
        attn_implementation=attention.implementation(attention.SDPA),
        trust_remote_code=bad.options.trust_remote_code,
        use_safetensors=True,
    )
    fix_frequencies(model, bad.options.max_length)
    return Scorer(model.eval())


def _score(scorer: "Scorer", pair: "BadPair") -> bool:
    """Prints a pair's log-probabilities and the norm of its margin's gradient. Returns whether all are finite."""
    import torch

    from dpo_ds.scoring.packed import pack

    scorer.zero_grad(set_to_none=True)
    chosen, rejected = scorer(pack([_group(pair)])).answers
    (chosen - rejected).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in scorer.parameters() if p.grad is not None]))
    tokens = len(pair.prompt) + sum(map(len, pair.answers))
    values = [float(chosen.detach()), float(rejected.detach()), norm]
    finite = all(map(math.isfinite, values))
    mark = "" if finite else "   <- not finite"
    where = f"row {pair.row}" + (f" of the data set {pair.source + 1}" if pair.source else "")
    console.say(f"{where:24s}  {tokens:6d}  {values[0]:12.3f}  {values[1]:14.3f}  {norm:13.4g}{mark}")
    return finite


def _group(pair: "BadPair") -> "Group":
    import numpy as np

    from dpo_ds.data.pairs import Group

    masks = [None, None] if pair.scored is None else [np.array(mask) for mask in pair.scored]
    answers = [np.array(answer, dtype=np.int32) for answer in pair.answers]
    return Group(np.array(pair.prompt, dtype=np.int32), answers, np.array([[0, 1]]), masks)


if __name__ == "__main__":
    console.run_main(main)
