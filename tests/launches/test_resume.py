"""Killed for real, at a step of its choosing: the run goes on and ends bit for bit where an undisturbed one does."""

import json

import launching
import pytest
import tiny
import torch
from safetensors.torch import load_file

STEPS, SAVE = 30, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    tiny.make("llama", place / "llama")
    for stage in (0, 3):
        zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if stage == 3 else {})}
        (place / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return place


def argv(place, name: str, stage: int, *more: str) -> list[str]:
    return [
        "-m", "dpo_ds.train", f"--model={place / 'llama'}", "--dataset=sample",
        f"--ds_config={place}/stage{stage}.json", f"--output_dir={place / name}",
        f"--cache_dir={place / 'cache'}", f"--max_steps={STEPS}",
        f"--save_every={SAVE}", "--eval_every=10", "--global_batch_pairs=4", "--eval_pairs=8", "--max_length=96",
        "--learning_rate=1e-3", "--generations=0", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [(1, 0, ["--lora", "--lora_dropout=0.1"]), (2, 3, [])],
    ids=["1-rank-stage0-lora-dropout", "2-ranks-stage3-offload"],
)
def test_killed_and_started_again_is_bit_identical(ranks, stage, more, place):
    straight, killed = place / f"straight-{ranks}", place / f"killed-{ranks}"
    launching.forked(ranks, argv(place, straight.name, stage, *more))
    words = argv(place, killed.name, stage, *more)
    launching.kill_after(ranks, words, killed, step=11)
    assert not (killed / "merged").exists()
    saved = sorted(path.name for path in (killed / "checkpoints").glob("step-*[0-9]"))
    assert "step-000008" in saved and f"step-{STEPS:06d}" not in saved

    again = launching.run(ranks, *words).stdout
    assert f"from {killed}/checkpoints/step-" in again
    assert launching.untimed(killed) == launching.untimed(straight)
    for name, tensor in load_file(straight / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(killed / "merged" / "model.safetensors")[name]), name

    if ranks == 1:
        assert "nothing to do" in launching.run(ranks, *words).stdout


def test_what_may_not_go_on_is_refused(place):
    """After the runs above: another run's folder, other options, another run's checkpoint, --resume never."""
    straight = place / "straight-1"
    cases = [
        (
            argv(place, straight.name, 0, "--beta=0.2", "--seed=7"),
            "holds another run (beta is not given there and 0.2 here; seed is",
        ),
        (argv(place, straight.name, 0, "--lora", "--lora_dropout=0.1", "--resume=never"), "name another folder"),
        (argv(place, "elsewhere", 0, f"--resume={place}"), "is no checkpoint"),
        (
            argv(place, "elsewhere", 3, f"--resume={place}/straight-1/checkpoints/step-000004"),
            "is of another run (lora is True there and False here",
        ),
        (
            argv(place, "elsewhere", 3, f"--resume={place}/straight-2/checkpoints/step-000004", "--max_steps=3"),
            "is of step 4, but this run has 3",
        ),
    ]
    for words, message in cases:
        done = launching.run(1, *words, check=False)
        assert done.returncode == 2 and message in done.stdout, done.stdout[-2000:]
        assert "Traceback" not in done.stdout


def test_a_checkpoint_that_was_not_finished_is_not_used(place):
    """What a kill within a save leaves behind carries another name, and the next start does not mind it."""
    folder = place / "partial"
    words = argv(place, folder.name, 0)
    launching.kill_after(1, words, folder, step=5)
    for whole in list((folder / "checkpoints").glob("step-*[0-9]")):
        whole.rename(whole.with_suffix(".partial"))
    done = launching.run(1, *words)
    assert "from " + str(folder) not in done.stdout
    assert len(launching.curve(folder)) == STEPS
