#!/usr/bin/env bash
# Runs the unit tests and one launch with the oldest versions that setup.py promises, in an environment of their own.
#   bash launch/oldest.sh [FOLDER]     FOLDER keeps the environment (default: .venv-oldest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:-.venv-oldest}")

# The lower bounds of install_requires: the newest patch of each oldest release.
bounds() {
    sed -n '/install_requires=\[/,/\]/p' setup.py | grep -oE '"[a-z_-]+>=[0-9.]+' | tr -d '"' | sed -E 's/>=([0-9]+\.[0-9]+|[0-9]+)$/==\1.*/'
}

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
install=("$folder/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check)
"${install[@]}" "$(bounds | grep '^torch==')"
mapfile -t oldest < <(bounds) # an array: a star in a version is no pattern of file names
"${install[@]}" "${oldest[@]}" 'pytest>=8,<10' 'pytest-xdist>=3.6' 'psutil>=5.9' 'hypothesis>=6.100'
"$folder/bin/python" -m pip list --disable-pip-version-check | grep -iE '^(torch|deepspeed|transformers|datasets|peft|numpy|huggingface_hub|tokenizers) '
PYTHONPATH=$PWD TORCH_EXTENSIONS_DIR="$folder/torch_extensions" \
    "$folder/bin/python" -m pytest --numprocesses 2 --dist loadfile tests/unit tests/launches/test_gradients.py -m "not launch"
