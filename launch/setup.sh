# Sourced by quickstart.sh and test.sh: makes .venv in the checkout and installs this package into it, once. Run as root,
# it also installs the system's package libaio-dev with apt-get, where that is missing. Nothing else outside changes.
# Says plainly which step failed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # without compiled files every rank spends seconds more on its imports
trap 'echo "dpo_ds: failed at: ${STEP:-start}" >&2' ERR

STEP="finding Python 3.10 or newer"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'

STEP="making the virtual environment .venv"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"

# A changed constraints.txt or setup.py installs again; otherwise the second run finds all as it is.
STAMP=".venv/installed-$(cat constraints.txt setup.py | sha256sum | cut -c1-16)"
if [ ! -e "$STAMP" ]; then
    # torch by itself first, at its tested version: elsewhere a plain "torch" may bring another build of several GB.
    STEP="installing torch with pip"
    python -m pip install --quiet --no-compile --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    STEP="installing dpo_ds and what it needs with pip"
    python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
    # Offload to NVMe alone needs libaio: where it cannot be had, everything else works.
    STEP="installing libaio-dev with apt-get"
    if [ ! -e /usr/include/libaio.h ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "dpo_ds: installing the system's package libaio-dev with apt-get, for offload to NVMe"
        apt() { DEBIAN_FRONTEND=noninteractive timeout 60 apt-get "$@" </dev/null >/dev/null 2>&1; }
        apt install --yes libaio-dev || { apt update && apt install --yes libaio-dev; } || true
    fi
    if [ ! -e /usr/include/libaio.h ]; then
        echo "dpo_ds: libaio-dev is missing and could not be installed: offload to NVMe will be refused" >&2
    fi
    touch "$STAMP"
fi
STEP="running ${0##*/}"
