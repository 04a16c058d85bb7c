"""Freeing what an engine leaves behind: memory in the allocators, NVMe buffers, swap files."""

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
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise glibc keeps freed blocks
    except OSError:
        pass


def free_swap_buffers(parameters: list) -> None:
    """Frees the locked buffers for parameters on NVMe: DeepSpeed never frees them."""
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
    """Removes the swap files of an engine, or of an earlier start; all ranks call it together. DeepSpeed never removes
    them, and would copy those of an earlier engine into each checkpoint."""
    if not folders:
        return
    collectives.wait_for_all()  # no rank is using its files any more
    if world.from_environment().local_rank == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: it holds the run's other engine's files
                folder.parent.rmdir()
    collectives.wait_for_all()  # before any rank makes its folders again
