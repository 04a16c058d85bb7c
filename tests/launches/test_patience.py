"""A rank that no longer answers: the others wait for it as long as a step's patience, and say so."""

import os
import signal
import subprocess
import sys
import time

import launching
import tiny


def test_a_rank_that_hangs_is_noticed(tmp_path):
    """Two ranks as torchrun would start them; the second is stopped, not killed, once steps have been made."""
    (tmp_path / "tier.json").write_text('{"zero_optimization": {"stage": 3}}')
    words = [
        "-m", "dpo_ds.train", f"--model={tiny.make('llama', tmp_path / 'llama')}", "--dataset=sample", "--eval_pairs=0",
        "--max_steps=100000", "--global_batch_pairs=4", "--max_length=64", "--export=none", "--loss=simpo",
        f"--ds_config={tmp_path / 'tier.json'}", f"--output_dir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path / 'cache'}", "--step_patience=0.15",
    ]  # fmt: skip
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "WORLD_SIZE": "2"}
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
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1, out[-3000:]
    (line,) = [line for line in out.splitlines() if "dpo_ds: error:" in line]
    assert "another rank did not answer for 0.15 minutes within a step" in line and "Traceback" not in out, out[-3000:]
