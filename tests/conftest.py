"""What every test shares: an environment without a hub, and a folder of their own for DeepSpeed's compiled ops."""

import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch, DeepSpeed or transformers; the launches of a test inherit all of it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path("~/.cache/dpo_ds-tests/torch_extensions").expanduser()))
# As the launches have it: with two compilers in turn, each start would compile DeepSpeed's ops again.
os.environ.setdefault("CXX", str(Path(__file__).resolve().parent / "tools" / "cxx.sh"))

# Threads that wait for work sleep. By default they spin, and two programs on two cores take each other's time: the unit
# tests of scoring took three times as long beside a launch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell's background job ignores SIGINT, and nohup's SIGHUP; so would every run that a test starts and interrupts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# The longest first, so that two workers end at about the same time (launch/test.sh keeps this order).
LONGEST = (
    *("test_signals", "test_losses", "test_models", "test_plan_measured", "test_resume", "test_wheel", "test_damage"),
    *("test_benchmarks", "test_ops", "test_resume_anywhere", "test_commands", "test_curves", "test_references"),
    *("test_hang", "test_nvme", "test_gradient_forms", "test_export"),
)


@pytest.fixture(scope="session", autouse=True)
def one_process_group():
    """Tests that build engines in this process join a process group, which stays until the end: DeepSpeed keeps the
    first one's subgroups, and a second one would not know them."""
    from dpo_ds.ranks import console

    leave = console.leave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "leave", lambda: None)
        yield
    leave()


@pytest.fixture
def documented_torch(monkeypatch):
    """The documents show plans made with the torch of constraints.txt. Before 2.13, torch rounds page-locked blocks up
    and runs need more host memory. There, this plans as if it did not; from 2.13 on it changes nothing."""
    import torch
    from packaging.version import Version

    from dpo_ds.ranks import process

    if Version(torch.__version__.split("+")[0]) < Version("2.13"):
        monkeypatch.setattr(process, "knows_exact_pinned", lambda: True)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.stem
        launch = "launches" in item.path.parts
        return LONGEST.index(name) if launch and name in LONGEST else len(LONGEST)

    items.sort(key=place)
