"""The list of all workarounds for faults of DeepSpeed, torch, transformers and others. It holds no workaround itself.

Each entry names the fault, the function that works around it (`where`), its test and the version with the fault. To add
one, write the code where it belongs and add an entry here; tests/unit/test_layout.py checks that they agree. Once a
release is free of the fault, set `mended_in`: `needed(name)` is then false, and the workaround can be removed.
"""

from dataclasses import dataclass
from importlib.metadata import version

from packaging.version import Version


@dataclass(frozen=True)
class Workaround:
    package: str
    fault: str
    where: str  # module:function in dpo_ds that works around it
    test: str  # file::test that fails without the workaround, or shows that it is still needed
    seen_in: str  # the version in which the fault was seen
    mended_in: str | None = None  # the first version without the fault, once there is one
    upstream: str | None = None  # issue or pull request, where known


WORKAROUNDS = {
    "deepspeed-m": Workaround(
        "deepspeed",
        "The launcher spells `-m` `--module` and refuses `-m`.",
        "dpo_ds.deepspeed_command:spell_out_module",
        "launches/test_deepspeed_command.py::test_launchers_m_becomes_module",
        "0.19.8",
    ),
    "left-lock": Workaround(
        "torch",
        "A process killed while it compiles an op leaves a file `lock` behind, and every later process waits for ever.",
        "dpo_ds.engine.ops:build_in_turns",
        "launches/test_ops.py::test_a_mark_that_was_left_holds_nobody_up",
        "2.13.0",
    ),
    "shared-memory-names": Workaround(
        "deepspeed",
        "Collectives on CPU never unlink their blocks in /dev/shm: 66 MiB for each rank of each run.",
        "dpo_ds.engine.join:_unname_shared_memory",
        "launches/test_commands.py::test_every_launcher_starts_the_same_run",
        "0.19.8",
    ),
    "launchers-and-signals": Workaround(
        "deepspeed",
        "The launchers kill ranks at a signal, or leave them running; a killed launch.py makes `deepspeed` end with 0.",
        "dpo_ds.engine.launch:main",
        "launches/test_signals.py::test_a_signal_stops_and_saves_and_the_same_command_goes_on",
        "0.19.8",
    ),
    "muon": Workaround(
        "deepspeed",
        "Each engine with ZeRO imports the optimizer Muon, which sets up torch's compiler: a second of each start.",
        "dpo_ds.engine.join:_import_muon",
        "launches/test_engines.py::test_a_closed_engine_gives_its_memory_back",
        "0.19.8",
    ),
    "gradients-twice": Workaround(
        "deepspeed",
        "ZeRO-3 with the optimizer on the host holds each gradient twice there, and moves it with every micro-batch.",
        "dpo_ds.engine.gradients:kept",
        "launches/test_gradient_forms.py::test_every_number_is_deepspeeds_own",
        "0.19.8",
    ),
    "renamed-collectives": Workaround(
        "deepspeed",
        "Calls collectives by names that torch 2.13 has renamed, with a warning for each call.",
        "dpo_ds.engine.join:quiet_start",
        "launches/test_commands.py::test_every_launcher_starts_the_same_run",
        "0.19.8",
    ),
    "pinned-powers-of-two": Workaround(
        "torch",
        "Page-locked blocks are rounded up to a power of two: 16.4 GiB take 32 GiB.",
        "dpo_ds.ranks.process:exact_pinned_memory",
        "unit/plan/test_plan.py::test_page_locked_memory_is_rounded_up_unless_torch_is_told_not_to",
        "2.13.0",
    ),
    "varlen-arguments": Workaround(
        "torch",
        "varlen_attn has no window in 2.10; fewer key heads need no argument in 2.11, but enable_gqa from 2.12 on.",
        "dpo_ds.scoring.attention:_torch_varlen",
        "unit/scoring/test_scoring.py::test_torchs_own_kernel_is_known_by_the_arguments_that_it_takes",
        "2.13.0",
    ),
    "frequencies-by-row": Workaround(
        "transformers",
        "The frequencies of LongRoPE and dynamic NTK depend on the largest position in the row.",
        "dpo_ds.scoring.rotary:fix_frequencies",
        "unit/scoring/test_scoring.py::test_frequencies_are_those_of_max_length_whatever_shares_the_row",
        "5.23.0",
    ),
    "bf16-first-step": Workaround(
        "deepspeed",
        "The bf16 optimizer at stage 0 allocates Adam's state by a step with zero gradients, and counts that step.",
        "dpo_ds.engine.build:_forget_first_step",
        "launches/test_engines.py::test_a_closed_engine_gives_its_memory_back",
        "0.19.8",
    ),
    "no-check-in-fp32": Workaround(
        "deepspeed",
        "At stage 0 in fp32 a gradient that is not finite is applied.",
        "dpo_ds.engine.engine:Engine.step",
        "launches/test_gradients.py::test_a_step_without_finite_gradients_is_skipped_at_every_stage",
        "0.19.8",
    ),
    "parameter-numbers": Workaround(
        "deepspeed",
        "Swap files are named by a counter in the process, so a policy's names can differ after a resume.",
        "dpo_ds.engine.build:policy_engine",
        "launches/test_nvme.py::test_a_resumed_run_is_bit_identical",
        "0.19.8",
    ),
    "adam-powers": Workaround(
        "deepspeed",
        "CPUAdam multiplies beta into beta^n step by step, but computes a power after a resume: the last bit differs.",
        "dpo_ds.engine.state:_count_as_before",
        "launches/test_resume.py::test_killed_and_started_again_is_bit_identical",
        "0.19.8",
    ),
    "locked-buffers": Workaround(
        "deepspeed",
        "The buffers for parameters on NVMe are locked in memory and never freed.",
        "dpo_ds.engine.memory:free_swap_buffers",
        "launches/test_nvme.py::test_a_resumed_run_is_bit_identical",
        "0.19.8",
    ),
    "left-swap-files": Workaround(
        "deepspeed",
        "Swap files are never removed, and an earlier engine's are copied into each checkpoint.",
        "dpo_ds.engine.memory:clear_swap_folders",
        "launches/test_nvme.py::test_a_resumed_run_is_bit_identical",
        "0.19.8",
    ),
    "engines-outlive": Workaround(
        "deepspeed",
        "ZeRO's hooks and groups form reference cycles, and some keep their memory after the engine is gone.",
        "dpo_ds.engine.engine:Engine.close",
        "launches/test_engines.py::test_a_closed_engine_gives_its_memory_back",
        "0.19.8",
    ),
    "broken-options": Workaround(
        "deepspeed",
        "Options that DeepSpeed accepts but gets wrong: Twin-Flow's ratio, bf16 masters, prefetch from NVMe.",
        "dpo_ds.engine.tiers:fill_tier",
        "unit/engine/test_tiers.py::test_what_is_refused_says_why",
        "0.19.8",
    ),
    "data-copies": Workaround(
        "datasets",
        "Copies of the rows in TMPDIR are not removed in a forked process.",
        "dpo_ds.runs.data:_tokenise",
        "unit/data/test_leftovers.py::test_a_start_leaves_nothing_in_tmpdir",
        "5.2.0",
    ),
    "private-files": Workaround(
        "safetensors",
        "save_file makes files that only this user may read, whatever the umask.",
        "dpo_ds.files:follow_umask",
        "unit/data/test_leftovers.py::test_modes_follow_the_umask",
        "0.8.0",
    ),
}


def needed(name: str) -> bool:
    """Whether the installed version still has the fault; workarounds that depend on a version ask this."""
    workaround = WORKAROUNDS[name]
    return workaround.mended_in is None or Version(version(workaround.package)) < Version(workaround.mended_in)
