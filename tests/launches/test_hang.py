"""No step or no answers scored for --hang_minutes: each rank writes its Python stacks, and the run ends with a line."""

import os
import signal
import subprocess
import sys
import time

import launching
import psutil
import pytest
import tiny


def options(place, *more: str) -> list[str]:
    (place / "tier.json").write_text('{"zero_optimization": {"stage": 3}}')
    return [
        f"--model={tiny.make('llama', place / 'llama')}", "--dataset=sample", "--eval_pairs=0", "--max_steps=100000",
        "--global_batch_pairs=4", "--max_length=64", "--export=none", "--hang_minutes=0.15",
        f"--ds_config={place / 'tier.json'}", f"--output_dir={place / 'run'}", f"--cache_dir={place / 'cache'}", *more,
    ]  # fmt: skip


def line_of(said: str, what: str = "step") -> str:
    (line,) = [line for line in said.splitlines() if "dpo_ds: error:" in line]
    assert "Traceback" not in said and f"no {what} for 0.15 minutes" in line, said[-3000:]
    return line


@pytest.mark.parametrize(
    ("at", "what", "file"), [("step 3", "step", "trainer.py"), ("table", "answers scored", "sweep.py")]
)
def test_a_rank_that_waits_for_ever_is_shown(at, what, file, tmp_path):
    """Rank 1 waits in Python for what never comes, rank 0 in a collective for rank 1."""
    gate = f'{{"at": "{at}", "ranks": [1], "file": "{tmp_path / "gate"}"}}'
    words = [str(launching.TOOLS / "gated.py"), *options(tmp_path)]
    done = launching.forked(2, words, check=False, GATE=gate)
    assert done.returncode == 1, done.stdout[-3000:]
    stacks = tmp_path / "run" / "stacks"
    assert f"stacks are in {stacks} (rank-0.txt, rank-1.txt); start again" in line_of(done.stdout, what)
    assert "gated.py" in (stacks / "rank-1.txt").read_text()
    assert file in (stacks / "rank-0.txt").read_text()


def test_a_rank_that_is_stopped_is_named(tmp_path):
    """Two ranks without a launcher; the second is stopped by a signal once steps have been made."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "WORLD_SIZE": "2"}
    words = ["-m", "dpo_ds.train", *options(tmp_path, "--loss=simpo")]
    ranks = [
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**launching.environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until = time.monotonic() + launching.HANGS
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < until and ranks[0].poll() is None, ranks[0].communicate()[0][-3000:]
            time.sleep(0.1)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        out, _ = ranks[0].communicate(timeout=launching.HANGS)
        assert ranks[0].returncode == 1, out[-3000:]
        assert "(rank-0.txt); rank 1 wrote none: its process is stopped or its node is gone" in line_of(out)
        assert "Current thread" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
        assert psutil.Process(ranks[1].pid).status() == psutil.STATUS_STOPPED
        os.kill(ranks[1].pid, signal.SIGCONT)
        assert ranks[1].wait(launching.HANGS) == 1, "it ends by itself, without rank 0"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
