"""Checks before a model is loaded that the machine has what DeepSpeed needs for a config: compilers, NVMe."""

import os
import resource
import shutil
from pathlib import Path

from dpo_ds.engine.check_config import QUANTISED
from dpo_ds.errors import UserError

CAP_IPC_LOCK = 14  # in capabilities(7): the process may lock memory beyond the limit


def require_compiler(name: str, config: dict, on_gpu: bool) -> None:
    """Raises UserError if DeepSpeed would have to compile its code and there is no compiler."""
    zero = config["zero_optimization"]
    if "offload_optimizer" in zero:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"--ds_config {name} keeps the optimizer on the host. DeepSpeed compiles it with {compiler}, which is "
                "not installed: install g++, or choose a tier without offload"
            )
    elif on_gpu and not config["optimizer"]["params"]["torch_adam"]:
        _require_nvcc(name, "torch_adam to false", "FusedAdam", "torch_adam")
    for key in QUANTISED:
        if on_gpu and zero.get(key):
            _require_nvcc(name, f"{key} to true", "quantizers", key)


def _require_nvcc(name: str, setting: str, code: str, key: str) -> None:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise UserError(
            f"--ds_config {name} sets {setting}, and DeepSpeed compiles its {code} with nvcc, which is not installed: "
            f"remove {key}, or install the CUDA toolkit"
        )


def require_nvme(folders: list[Path]) -> None:
    """Raises UserError, with the remedy, if DeepSpeed would abort for lack of libaio, locked memory or direct I/O."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise UserError("offload to nvme needs libaio, its headers and g++: install Debian's libaio-dev and g++")
    if not may_lock_memory():
        raise UserError(
            "offload to nvme locks its buffers in memory, and the limit here is too low: run ulimit -l unlimited first"
        )
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
        raise UserError(
            f"offload to nvme: {folder} does not support direct I/O ({error.strerror}): name a folder on a local drive"
        ) from None
    finally:
        probe.unlink(missing_ok=True)
