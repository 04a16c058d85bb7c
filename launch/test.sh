#!/usr/bin/env bash
# Sets up .venv (as quickstart.sh does) and runs all tests; arguments go to pytest. Needs no GPU.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

python -m pytest "$@"
