#!/usr/bin/env bash
# Sets up .venv (as quickstart.sh does) and runs all tests; arguments go to pytest. Needs no GPU.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Two files at a time: much of a launch is one core's work. A file's launches are shared by its tests.
python -m pytest --numprocesses 2 --dist loadfile "$@"
