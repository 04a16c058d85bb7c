"""What offload to NVMe asks of a machine, found out before a model is loaded."""

import os
import resource
from pathlib import Path

CAP_IPC_LOCK = 14  # capabilities(7): memory may be locked beyond the limit


def require_nvme(folders: list[Path]) -> None:
    """Raises ValueError, with the remedy, where DeepSpeed would abort: no libaio, no locked memory, no direct I/O."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError("offload to nvme needs libaio, its headers and g++: install Debian's libaio-dev and g++")
    if not may_lock_memory():
        raise ValueError("offload to nvme locks its buffers in memory, which is limited here: ulimit -l unlimited")
    for folder in folders:
        _require_direct_io(folder)


def may_lock_memory() -> bool:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    (effective,) = [int(line.split()[1], 16) for line in lines if line.startswith("CapEff")]
    return bool(effective >> CAP_IPC_LOCK & 1)


def _require_direct_io(folder: Path) -> None:
    probe = folder / f".direct-io-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        raise ValueError(
            f"offload to nvme: {folder} takes no direct I/O ({error.strerror}): name a folder on a local drive"
        ) from None
    finally:
        probe.unlink(missing_ok=True)
