"""Which rank of a run this process is.

A run is started by deepspeed, torchrun, accelerate or plain python; all but the last say in the environment which rank
this is. Plain python is a world of one.
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
    """Which rank the launcher says this is; nothing is started."""
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
    return World(rank, local_rank, size)
