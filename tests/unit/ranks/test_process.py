"""Work in a child process."""

import os
import signal
import sys

import pytest

from dpo_ds.errors import RunStopped, UserError
from dpo_ds.ranks import process


def test_a_childs_result_comes_back_and_what_it_imported_does_not():
    def work():
        import colorsys

        return os.getpid(), colorsys.__name__

    sys.modules.pop("colorsys", None)
    child, found = process.in_a_child("work", work)
    assert child != os.getpid() and found == "colorsys" and "colorsys" not in sys.modules


@pytest.mark.parametrize("error", [UserError("name another"), FileNotFoundError("there"), ZeroDivisionError("a bug")])
def test_what_a_child_raises_is_raised_here(error):
    def work():
        raise error

    with pytest.raises(type(error), match=str(error)) as raised:
        process.in_a_child("work", work)
    # A bug keeps the child's own traceback; the user's mistake needs none.
    assert isinstance(raised.value.__cause__, process.FromChild) != isinstance(error, UserError)
    assert isinstance(error, UserError) or "in work" in str(raised.value.__cause__)


def test_an_error_that_does_not_pickle_is_told_all_the_same():
    class Local(Exception):
        pass

    def work():
        raise Local("its words")

    with pytest.raises(RuntimeError, match="Local: its words"):
        process.in_a_child("work", work)


def test_a_child_that_is_killed_stops_the_run():
    with pytest.raises(RunStopped, match="work: its process ended with exit code -9 "):
        process.in_a_child("work", lambda: os.kill(os.getpid(), signal.SIGKILL))
