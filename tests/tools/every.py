"""EVERY=1 in the environment runs each test of a kind of which a sample usually runs: about ten minutes more.

The rest are combinations: their parts are all in the sample.
"""

import os
from collections.abc import Iterable

import pytest

EVERY = bool(os.environ.get("EVERY"))
_ONLY = pytest.mark.skipif(not EVERY, reason="EVERY=1 runs it")


def sampled(cases: Iterable[str], rest: Iterable[str]) -> list:
    """The cases as pytest's parameters; those in `rest` run with EVERY=1 alone."""
    return [pytest.param(case, marks=_ONLY if case in rest else ()) for case in cases]
