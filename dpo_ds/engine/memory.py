"""Giving an engine's memory back: the allocators', NVMe buffers', swap files'."""

import contextlib
import ctypes
import gc
import shutil
from pathlib import Path

import torch

from dpo_ds.ranks import collectives, world


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed blocks for itself otherwise
    except OSError:
        pass


def free_swap_buffers(parameters: list) -> None:
    """DeepSpeed locks the buffers through which parameters come from NVMe in memory, and never gives them back."""
    for swapper in {id(s): s for p in parameters if (s := getattr(p, "nvme_swapper", None))}.values():
        swapper.synchronize_writes()
        for handle, buffer in (
            (swapper.aio_read_handle, swapper.buffers),
            (swapper.aio_write_handle, swapper.partitioned_swap_buffer),
        ):
            if buffer is not None:
                handle.free_cpu_locked_tensor(buffer)
        swapper.buffers = swapper.partitioned_swap_buffer = swapper.partitioned_swap_pool = None


def clear_swap_folders(folders: list[Path]) -> None:
    """Removes what an engine, or an earlier start's, wrote to NVMe; by all ranks together. DeepSpeed leaves its files
    behind, and would copy an earlier engine's into each checkpoint."""
    if not folders:
        return
    collectives.wait_for_all()  # no rank is using its files any more
    if world.from_environment().local_rank == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: the run's other engine is in it
                folder.parent.rmdir()
    collectives.wait_for_all()  # before any rank makes its folders anew
