"""Which rank of a run this process is.

deepspeed, torchrun and accelerate set the rank in the environment. A run started by plain python has one rank.
"""

import os
from dataclasses import dataclass

from dpo_ds.errors import UserError, one_line

REMEDY = "start the ranks with deepspeed or torchrun, which set these, or unset them to run on one"
HIGHEST_PORT = 65535


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
    """Reads the rank that the launcher has set. Starts nothing.

    Raises UserError for what no launcher sets. With RANK alone, for one, every rank would wait for another rank 0.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank is None and size is None:
        return World(0, 0, 1)
    if rank is None or size is None:
        there, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        raise UserError(f"{there} is set in the environment, but {missing} is not: {REMEDY}")
    local_rank = _number("LOCAL_RANK", 0) or 0
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value >= size:
            raise UserError(f"{name} is {value}, but must be below WORLD_SIZE, which is {size}: {REMEDY}")
    local_size = _number("LOCAL_WORLD_SIZE", 1)
    if local_size is not None and (local_size > size or size % local_size):
        raise UserError(f"LOCAL_WORLD_SIZE is {local_size}, but must divide WORLD_SIZE, which is {size}: {REMEDY}")
    if size > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE is {size}, but MASTER_ADDR does not say where rank 0 is: {REMEDY}")
    if (port := _number("MASTER_PORT", 1)) is None and size > 1:
        raise UserError(f"WORLD_SIZE is {size}, but MASTER_PORT does not say where rank 0 listens: {REMEDY}")
    if port is not None and port > HIGHEST_PORT:
        raise UserError(f"MASTER_PORT is {port}, but must be at most {HIGHEST_PORT}: {REMEDY}")
    return World(rank, local_rank, size)


def _number(name: str, least: int) -> int | None:
    """A whole number of the environment; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UserError(f"{name} is {one_line(repr(text))}, but must be a whole number from {least}: {REMEDY}")
    return int(text)
