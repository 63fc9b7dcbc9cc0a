# shellcheck shell=bash
# Sourced by every finding: `venv PIN...` installs these packages and sets $python, the interpreter that has them.
#
# By default the environment lives in a temporary folder that is deleted when the script ends. If FINDINGS_VENV_DIR is set,
# environments are kept there under a hash of their pins, and scripts with the same pins share one.
# $scratch is an empty folder that is always deleted. Exits 2 if pip fails.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

venv() {
    local folder=$scratch/venv
    if [ -n "${FINDINGS_VENV_DIR:-}" ]; then
        folder=$FINDINGS_VENV_DIR/$(printf '%s\n' "$@" | sort | sha256sum | cut -c1-16)
    fi
    if [ ! -e "$folder/.complete" ]; then
        { python3 -m venv "$folder" && "$folder/bin/pip" install -q "$@" 2>"$scratch/pip.log" && touch "$folder/.complete"; } ||
            { cat "$scratch/pip.log" >&2; exit 2; }
    fi
    # shellcheck disable=SC2034  # used by the scripts
    python=$folder/bin/python
    # Ops that DeepSpeed compiles belong to the environment that compiled them.
    export PATH="$folder/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/ops" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
}
