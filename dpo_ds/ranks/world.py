"""Which rank of a run this process is.

deepspeed, torchrun and accelerate set the rank in the environment. A run started by plain python has one rank.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int  # on its node
    size: int
    # The cores that this process had before it took its share of them (engine.join); empty if it took none.
    all_cores: frozenset[int] = frozenset()

    @property
    def speaks(self) -> bool:
        return self.rank == 0


def from_environment() -> World:
    """Reads the rank that the launcher has set. Starts nothing."""
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
    return World(rank, local_rank, size)
