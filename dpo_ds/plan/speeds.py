"""How fast machines are: what their makers say, and how much of that a run reaches.

Nothing here was measured by us: dpo_ds has not run on a GPU yet. `--plan measure` needs none of it.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass

from dpo_ds.errors import UserError
from dpo_ds.models.flops import H100_PCIE, PEAKS

# The part of a maker's figure that a run reaches. Estimates.
PRODUCTS = 0.72  # of the peak of dense products
GPU_MEMORY = 0.85  # of the bandwidth of a GPU's memory, by element-wise kernels
LINK = 0.77  # of a link's bandwidth one way, by NCCL's collectives and by copies of page-locked memory
HOST_MEMORY = 0.65  # of the bandwidth of a node's memory, by CPUAdam


@dataclass(frozen=True)
class Speeds:
    """A machine's speeds in FLOP/s and bytes/s: in MACHINES as its maker gives them, else as a run reaches them."""

    name: str
    gib: int  # of a GPU's memory
    products: float  # dense bf16 products
    gpu_memory: float
    between_gpus: float  # into a GPU, from the others of its node
    between_nodes: float  # into a node
    to_host: float  # between a GPU and the host, each way
    host_memory: float  # of a node
    disk: float  # of a node. An estimate for a local RAID of NVMe drives; a network's file system is slower.

    @property
    def reached(self) -> "Speeds":
        """What a run reaches of a maker's figures."""
        return dataclasses.replace(
            self,
            products=PRODUCTS * self.products,
            gpu_memory=GPU_MEMORY * self.gpu_memory,
            between_gpus=LINK * self.between_gpus,
            between_nodes=LINK * self.between_nodes,
            to_host=LINK * self.to_host,
            host_memory=HOST_MEMORY * self.host_memory,
        )


# NVLink's and PCIe's figures of data sheets count both ways; these are half of them.
PCIE_4, PCIE_5 = 32e9, 64e9
# Nodes: NVIDIA's guides to DGX A100 (two EPYC 7742, 8 channels of DDR4-3200 each; 8 x 200 Gbit/s) and DGX H100 (two
# Xeon 8480C, 8 channels of DDR5-4800 each; 8 x 400 Gbit/s).
DGX_A100 = {"between_nodes": 200e9, "host_memory": 2 * 8 * 25.6e9, "disk": 5e9}
DGX_H100 = {"between_nodes": 400e9, "host_memory": 2 * 8 * 38.4e9, "disk": 5e9}
# GPUs: NVIDIA's data sheets of A100, H100 and H200 Tensor Core GPUs (without sparsity). Without NVLink, GPUs reach each
# other by PCIe.
MACHINES = {
    machine.name: machine
    for machine in (
        Speeds("a100-40", 40, PEAKS["A100"], 1.555e12, 300e9, to_host=PCIE_4, **DGX_A100),
        Speeds("a100-80", 80, PEAKS["A100"], 2.039e12, 300e9, to_host=PCIE_4, **DGX_A100),
        Speeds("a100-80-pcie", 80, PEAKS["A100"], 1.935e12, PCIE_4, to_host=PCIE_4, **DGX_A100),
        Speeds("h100", 80, PEAKS["H100"], 3.35e12, 450e9, to_host=PCIE_5, **DGX_H100),
        Speeds("h100-pcie", 80, H100_PCIE, 2.0e12, PCIE_5, to_host=PCIE_5, **DGX_H100),
        Speeds("h200", 140, PEAKS["H200"], 4.8e12, 450e9, to_host=PCIE_5, **DGX_H100),
    )
}


def named(name: str) -> Speeds:
    """What the machine reaches that --machine names. Raises UserError if there is none."""
    if name not in MACHINES:
        close = difflib.get_close_matches(name, MACHINES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--machine {name} is not known: {hint}say one of {', '.join(MACHINES)}, or leave it out")
    return MACHINES[name].reached


def of_device(name: str) -> Speeds | None:
    """Of a GPU with the driver's name for it, such as "NVIDIA A100-SXM4-80GB"; None if it is not known."""
    words = set(re.split(r"[\s-]+", name.upper()))
    if words & {"MIG", "NVL"}:  # a part of a GPU, and cards with speeds of their own
        return None
    for kind in ("H200", "H100", "A100"):
        if kind in words:
            size = ("-40" if "40GB" in words else "-80") if kind == "A100" else ""
            found = MACHINES.get(f"{kind.lower()}{size}" + ("-pcie" if words & {"PCIE", "PCI"} else ""))
            return found and found.reached
    return None


def of_memory(gib: float) -> Speeds | None:
    """Of a GPU with about so much memory, which says nothing more: an A100, or an H200. None if there is none."""
    sizes = (MACHINES[name] for name in ("a100-40", "a100-80", "h200"))
    return next((machine.reached for machine in sizes if abs(machine.gib - gib) <= 2), None)
