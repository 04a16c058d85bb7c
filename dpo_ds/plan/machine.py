"""The machine of a run (GPUs, host memory, NVMe): this one, or another that the options describe."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.plan.speeds import Speeds, named, of_device, of_memory
from dpo_ds.ranks import world

GIB = 2**30
NODE_GPUS = 8


def gib(size: int) -> str:
    """A size in GiB with at most three digits: the estimates are no more precise."""
    value = size / GIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


@dataclass(frozen=True)
class Machine:
    """The machine for a plan. Sizes in bytes. `gpu_memory` is None without GPUs: then ranks share host memory."""

    ranks: int
    ranks_per_node: int
    gpu_memory: int | None
    host_memory: int  # of each node
    nvme: int = 0  # of each node
    speeds: Speeds | None = None  # as far as they are known

    @classmethod
    def of(cls, options: Options) -> "Machine":
        """The machine that the options describe; by default this one, with the launcher's number of ranks."""
        import torch

        ranks = options.gpus or world.from_environment().size
        per_node = min(ranks, NODE_GPUS) if options.gpus else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if ranks % per_node:
            raise UserError(f"--gpus {ranks} is not a multiple of the {NODE_GPUS} GPUs in a node: plan for a multiple")
        gpu, fast, host = None, None, host_memory()
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            gpu, fast = device.total_memory, of_device(device.name)
        elif options.gpus or options.gpu_memory or options.machine:  # another machine: by default with A100s
            gpu, host = 80 * GIB, 1000 * GIB
        if options.machine is not None:
            fast = named(options.machine)
            if options.gpus or not torch.cuda.is_available():  # else the sizes are those of the GPUs that are there
                gpu, host = fast.gib * GIB, 1000 * GIB
        if options.gpu_memory:
            gpu = int(options.gpu_memory * GIB)
        if gpu is not None and fast is None and not torch.cuda.is_available():
            fast = of_memory(gpu / GIB)
        host = int(options.host_memory * GIB) if options.host_memory else host
        nvme = int(options.nvme * GIB) if options.nvme is not None else nvme_free(options.nvme_path)
        return cls(ranks, per_node, gpu, host, nvme, fast)

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    @property
    def name(self) -> str:
        host = f"{gib(self.host_memory)} GiB of host memory" + (" each" if self.nodes > 1 else "")
        nvme = f", {gib(self.nvme)} GiB of NVMe" if self.nvme else ""
        return f"{self.devices}, {host}{nvme}"

    @property
    def devices(self) -> str:
        if self.gpu_memory is None:
            return f"{self.ranks} rank(s) without GPU"
        where = f"{self.nodes} nodes of {self.ranks_per_node}" if self.nodes > 1 else f"{self.ranks}"
        return f"{where} GPU(s) of {gib(self.gpu_memory)} GiB"


def require_here(options: Options) -> None:
    """Raises UserError if what starts here is planned for another machine: other GPUs, or another number of them."""
    import torch

    ranks = world.from_environment().size
    if options.machine is not None:
        named(options.machine)  # an unknown name comes first, with the nearest one
    if options.gpus is not None and options.gpus != ranks:
        raise UserError(
            f"--gpus {options.gpus} plans for another machine than this, where {ranks} rank(s) run: leave it out, or "
            "say --plan only"
        )
    for name in ("machine", "gpu_memory"):
        if (value := getattr(options, name)) is not None and not torch.cuda.is_available():
            raise UserError(f"--{name} {value} is of GPUs, and none is here: leave it out, or say --plan only")


def host_memory() -> int:
    """Bytes of memory that this node's ranks may use: the machine's, or the limit of a control group or of ulimit if
    that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:  # ulimit -v, of each process
        limits.append(limit * int(os.environ.get("LOCAL_WORLD_SIZE", world.from_environment().size)))
    own = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    for line in own:
        number, controllers, path = line.split(":", 2)
        root, file = (
            ("/sys/fs/cgroup", "memory.max") if number == "0" else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        )
        if number == "0" or "memory" in controllers.split(","):
            # Any parent group may have a limit. In a container, the group's own path may not exist.
            folder = Path(root + path)
            for group in (folder, *folder.parents):
                if not str(group).startswith(root):
                    break
                if (group / file).is_file() and (text := (group / file).read_text().strip()).isdigit():
                    limits.append(int(text))
    return min(limits)


def nvme_free(path: str | None) -> int:
    if path is None:
        return 0
    folder = Path(path).expanduser().absolute()
    disk = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))  # the run makes the folder
    return disk.f_frsize * disk.f_bavail
