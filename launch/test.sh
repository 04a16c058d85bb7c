#!/usr/bin/env bash
# Sets up .venv (as quickstart.sh does) and runs all tests; needs no GPU. Arguments go to pytest.
#   bash launch/test.sh           everything
#   bash launch/test.sh --fast    the unit tests, which start no process of their own
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

what=(tests)
if [ "${1:-}" = --fast ]; then
    what=(tests/unit -m "not launch")
    shift
fi
# Two files at a time: much of a launch is one core's work. A file's launches are shared by its tests.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${what[@]}" "$@"
