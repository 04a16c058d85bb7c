"""dpo_ds.evaluate on a run, its merged folder, a checkpoint of it and an adapter: the figures of plain forwards.

On 1 and 2 ranks, ZeRO-0 and ZeRO-3.
"""

import gzip
import json
import math
import re
import shutil

import adapters
import launching
import numpy as np
import oracle
import pytest
import tiny
import torch
from peft import PeftModel

from dpo_ds.data.pairs import PairSet
from dpo_ds.embedded import sample_file
from dpo_ds.errors import UserError
from dpo_ds.evaluate import main
from dpo_ds.reports.figures import wilson

HELD_OUT, PAIRS, BETA = 8, 30, 0.3
ATOL = 3e-4  # nats of an answer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of all weights in place/run, an adapter, and pairs from two files, half of them with a weight."""
    place = tmp_path_factory.mktemp("evaluate")
    tiny.make("llama", place / "llama")
    adapters.make(place / "llama", place / "sft")
    with gzip.open(sample_file(), "rt") as file:
        rows = [json.loads(next(file)) for _ in range(PAIRS)]
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        lines = [json.dumps({**row, "weight": 1 + n % 2}) + "\n" for n, row in enumerate(part)]
        (place / f"{name}.jsonl").write_text("".join(lines))
    launching.run(
        1, "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", "sample", "--output_dir", place / "run",
        "--cache_dir", place / "cache", "--max_steps", 4, "--save_every", 2, "--global_batch_pairs", 8,
        "--learning_rate", 5e-3, "--max_length", 96, "--eval_pairs", HELD_OUT, "--precision", "fp32",
        "--beta", BETA, "--generations", 0,
    )  # fmt: skip
    return place


def evaluated(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def in_this_process(place, name: str, *words) -> dict:
    own = ["--output_dir", place / name, "--cache_dir", place / "cache"]
    main([str(word) for word in (*words, *own)])
    return evaluated(place / name)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def scored(place, folder, policy, reference) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """The oracle's logps [n, 2] of the evaluated pairs, their lengths [n, 2] and their weights."""
    wanted = [line["pair"] for line in lines_of(folder)]
    sets = [PairSet.open(manifest.parent) for manifest in (place / "cache" / "tokens").glob("*/manifest.json")]
    for pairs in sorted(sets, key=len):  # the same pair may be in another, larger set with another weight
        by_id = {pairs.pair_id(i): (pairs.pair(i), float(pairs.weights[i])) for i in range(len(pairs))}
        if by_id.keys() >= {*wanted}:
            break
    found = [by_id[pair] for pair in wanted]
    tokens = [pair for pair, _ in found]
    with torch.no_grad():
        logps = [oracle.pairs_logps(model, tokens) for model in (policy, reference)]
    lengths = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in tokens])
    return *logps, lengths, np.array([weight for _, weight in found])


def require_the_oracles(place, folder, policy, reference, beta: float) -> dict:
    """Compares every pair's values, and the figures. Returns the figures of all pairs."""
    ours, theirs, lengths, weights = scored(place, folder, policy, reference)
    lines = lines_of(folder)
    for name, logps in (("", ours), ("reference_", theirs)):
        shown = [[line[f"{name}chosen"], line[f"{name}rejected"]] for line in lines]
        np.testing.assert_allclose(shown, logps, rtol=0, atol=ATOL)
    ratios = (ours - theirs).double()
    margins = beta * (ratios[:, 0] - ratios[:, 1]).numpy()
    found = evaluated(folder)["all"]
    against, share = found["against"], found["against"]["accuracy"]
    right = np.average(margins > 0, weights=weights)
    assert found["pairs"] == len(lines) and share["value"] == pytest.approx(right)
    assert (share["low"], share["high"]) == pytest.approx(wilson(right, weights.sum() ** 2 / (weights**2).sum()))
    assert against["margin"]["value"] == pytest.approx(np.average(margins, weights=weights), abs=ATOL)
    per_token = (ratios / lengths).numpy()
    kl = np.average((np.expm1(-per_token) + per_token).mean(axis=1), weights=weights)
    assert against["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    for side, name in enumerate(("chosen", "rejected")):
        assert against[name]["value"] == pytest.approx(np.average(ratios[:, side], weights=weights), abs=ATOL)
        mean = np.average(per_token[:, side], weights=weights)
        assert against[f"{name}_per_token"]["value"] == pytest.approx(mean, abs=ATOL)
    assert np.abs(ratios.numpy()).max() > 0.05, "nothing was learnt: the comparison shows nothing"
    return found


def test_a_run_on_its_own_held_out_pairs(place):
    """As the run's own last evaluation, which is of the same pairs; the reference's values come from its table."""
    found = in_this_process(place, "own", "--model", place / "run", "--generations", 3, "--answer_tokens", 12)
    models = oracle.load(place / "run" / "merged"), oracle.load(place / "llama")
    all_pairs = require_the_oracles(place, place / "own", *models, BETA)
    (last,) = [line for line in launching.metrics(place / "run") if "eval/loss" in line][-1:]
    for metric, value in (("rewards/margins", all_pairs["against"]["margin"]["value"]),
                          ("kl", all_pairs["against"]["kl"]),
                          ("logps_per_token/chosen", all_pairs["policy"]["chosen"]["value"])):  # fmt: skip
        assert last[f"eval/{metric}"] == pytest.approx(value, abs=ATOL), metric
    assert all_pairs["pairs"] == HELD_OUT and found["beta"] == BETA
    files = [set(hashes) for hashes in found["weights"].values()]
    assert list(found["weights"]) == ["--model", "--reference_model"]
    assert files == [{"config.json", "model.safetensors"}] * 2
    assert found["by_source"] == {} and sum(part["pairs"] for part in found["by_length"].values()) == HELD_OUT
    page = (place / "own" / "generations.md").read_text()
    assert page.count("| greedy |") == page.count("| sampled |") == 3 and "| | run | llama |" in page
    assert (place / "own" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "## By length" in (place / "own" / "evaluation.md").read_text()


def test_two_ranks_and_zero_3_have_the_same_figures(place):
    """A merged folder and a reference that is named, on pairs from two files with weights."""
    (place / "stage3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    words = ["--model", place / "run" / "merged", "--reference_model", place / "llama", "--beta", 0.1,
             "--dataset", f"{place / 'a.jsonl'},{place / 'b.jsonl'}", "--generations", 0]  # fmt: skip
    out = launching.run(
        2, "-m", "dpo_ds.evaluate", *words, "--ds_config", place / "stage3.json", "--cache_dir", place / "cache-2",
        "--output_dir", place / "two",
    ).stdout  # fmt: skip
    assert out.count("| accuracy of the reward |") == 1, "one rank speaks"
    assert "to score" in out and not (place / "two" / "generations.md").exists()
    one, two = in_this_process(place, "one", *words), evaluated(place / "two")
    assert one["dataset"] == f"{place / 'a.jsonl'},{place / 'b.jsonl'}"
    models = oracle.load(place / "run" / "merged"), oracle.load(place / "llama")
    require_the_oracles(place, place / "one", *models, 0.1)
    assert set(one["by_source"]) == {str(place / "a.jsonl"), str(place / "b.jsonl")}
    require_close(one, two)


def require_close(one, two) -> None:
    """Numbers agree as far as rounding allows, and everything else to the letter."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            require_close(one[key], two[key])
    elif isinstance(one, float):
        assert math.isclose(one, two, rel_tol=1e-4, abs_tol=ATOL), (one, two)
    else:
        assert one == two


def test_a_checkpoint_is_what_the_run_was_then(place):
    """Its weights are exported for the evaluation, and not left behind."""
    checkpoints = place / "run" / "checkpoints"
    last = in_this_process(place, "last", "--model", checkpoints / "step-000004", "--generations", 0)
    np.testing.assert_allclose(
        [line["chosen"] for line in lines_of(place / "last")],
        [line["chosen"] for line in lines_of(place / "run")], rtol=0, atol=ATOL,
    )  # fmt: skip
    early = in_this_process(place, "early", "--model", checkpoints / "step-000002", "--generations", 0)
    assert "step 2 of the run" in early["policy"] and early["policy_short"] == "run, step 2"
    assert early["all"]["against"]["kl"] != last["all"]["against"]["kl"] and early["beta"] == BETA
    assert not list((place / "early").glob("weights-*"))


def test_a_damaged_export_is_neither_judged_nor_trained_on(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    merged = tmp_path / "run" / "merged"
    content = bytearray((merged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (merged / "model.safetensors").write_bytes(content)
    problem = f"{merged} model.safetensors does not match its checksum: its run's command exports it again"
    with pytest.raises(UserError, match=re.escape(problem)):
        in_this_process(place, "damaged", "--model", tmp_path / "run", "--generations", 0)
    words = ["--model", merged, "--dataset", "sample", "--output_dir", tmp_path / "next", "--max_steps", 1]
    trained = launching.run(1, "-m", "dpo_ds.train", *words, check=False)
    assert trained.returncode == 2 and problem in trained.stdout
    assert not (tmp_path / "next").exists()
    shutil.copytree(merged, tmp_path / "copy")
    words = ["--model", tmp_path / "copy", "--reference", "none", "--dataset", place / "a.jsonl", "--generations", 0]
    in_this_process(place, "as-it-is", *words)


def test_an_adapter_against_its_base_and_a_model_alone(place):
    words = ["--dataset", place / "a.jsonl", "--max_length", 96]
    found = in_this_process(place, "adapter", "--model", place / "sft", "--generations", 1, *words)
    policy = PeftModel.from_pretrained(oracle.load(place / "llama"), place / "sft").eval()
    require_the_oracles(place, place / "adapter", policy, oracle.load(place / "llama"), 0.1)
    assert found["reference"] == f"{place / 'llama'} (the adapter's base)"
    assert "| | sft | llama |" in (place / "adapter" / "generations.md").read_text()
    alone = in_this_process(place, "alone", "--model", place / "llama", "--generations", 1, *words)
    assert alone["all"]["against"] is None and alone["reference"] is None
    assert alone["all"]["policy"] == found["all"]["reference"], "the same values, from the same table"
    assert "| | llama |" in (place / "alone" / "generations.md").read_text()
