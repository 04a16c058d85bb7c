"""Prepares the next items in a thread while the device computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Ready = TypeVar("Ready")


def ahead(prepare: Callable[[Item], Ready], items: Iterable[Item], many: int = 2) -> Iterator[Ready]:
    """Yields prepare(item) for each item, in order. Up to `many` are prepared ahead of time in one thread. If
    `prepare` raises, the error is raised when that item's result is taken."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        begun: deque[Future[Ready]] = deque()
        for item in items:
            begun.append(thread.submit(prepare, item))
            if len(begun) > many:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
