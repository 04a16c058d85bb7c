"""What ranks do together: values from rank 0, sums, and work that one rank does for the others."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dpo_ds.errors import RunStopped, SaveFailed, UserError
from dpo_ds.ranks import world

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    import numpy as np
    import torch

T = TypeVar("T")

SHARED = {kind.__name__: kind for kind in (UserError, RunStopped, SaveFailed)}  # what all ranks raise alike


@dataclass(frozen=True)
class Problem:
    """An error on a rank, as the other ranks receive it."""

    rank: int
    host: str
    kind: str  # the error's type: one of SHARED, or that of a bug
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Problem":
        """This rank's error."""
        return cls(world.from_environment().rank, socket.gethostname(), type(error).__name__, str(error))

    def to_raise(self) -> Exception:
        """What the other ranks raise: the same kind for those of SHARED; for a bug, where to look."""
        if self.kind in SHARED:
            said = self.message if self.rank == 0 else f"rank {self.rank} on {self.host}: {self.message}"
            return SHARED[self.kind](said)
        return RunStopped(f"rank {self.rank} on {self.host} failed ({self.kind}); its own output says where")


def one_after_another(work: Callable[[], T]) -> T:
    """Runs cached work on rank 0 first, then on the first rank of every other node, then on the rest.

    The first call fills a cache, which the later ones find on a shared file system or on their node's. An error on any
    rank stops all ranks: the rank itself raises its error, and the others raise Problem.to_raise().
    """
    here = world.from_environment()
    if here.size == 1:
        return work()
    my_turn = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    result, own_error, problem = None, None, None
    for turn in range(3):
        if turn == my_turn and problem is None:
            try:
                result = work()
            except Exception as error:
                own_error = error
                problem = Problem.of(error)
        problem = first(problem)
    if own_error is not None and not isinstance(own_error, UserError):
        raise own_error
    if problem is not None:
        raise problem.to_raise()
    return result  # type: ignore[return-value]  # each rank had its turn


def on_rank_0(work: Callable[[], T]) -> T:
    """Runs work on rank 0 alone, and returns its result or raises its error on every rank."""
    return from_rank_0(one_after_another(lambda: work() if world.from_environment().speaks else None))  # type: ignore


def together(work: Callable[[], T]) -> list[T]:
    """Runs work on all ranks at the same time, and returns every rank's result, in the order of the ranks. An error on
    any rank stops all of them, as in one_after_another."""
    result, own_error, problem = None, None, None
    try:
        result = work()
    except Exception as error:
        own_error, problem = error, Problem.of(error)
    found = gather((result, problem))
    if own_error is not None:
        raise own_error
    if (theirs := _first([problem for _, problem in found])) is not None:
        raise theirs.to_raise()
    return [result for result, _ in found]  # type: ignore[misc]  # no rank had a problem


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, in the order of the ranks."""
    if world.from_environment().size == 1:
        return [value]
    import torch

    values: list = [None] * world.from_environment().size
    torch.distributed.all_gather_object(values, value)
    return values


def first(value: T | None) -> T | None:
    """The value of the first rank that has one, on every rank; None if no rank has."""
    return _first(gather(value))


def _first(values: list[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world.from_environment().size == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def array_from_rank_0(array: "np.ndarray") -> "np.ndarray":
    """Rank 0's array, on every rank. All ranks must pass an array of the same shape and dtype."""
    if world.from_environment().size == 1:
        return array
    import torch

    tensor = torch.from_numpy(array).to(device())
    torch.distributed.broadcast(tensor, 0)
    return tensor.cpu().numpy()


def device() -> str:
    """The device on which tensors must be for a collective."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sum_over_ranks(tensor: "torch.Tensor") -> "torch.Tensor":
    """All-reduces `tensor` in place (sum) and returns it: the one collective that dpo_ds itself uses in training."""
    if world.from_environment().size > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    if world.from_environment().size > 1:
        import torch

        torch.distributed.barrier()
