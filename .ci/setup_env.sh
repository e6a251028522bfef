#!/usr/bin/env bash
# Prepare the project's own virtual environment. Safe to repeat: instant when nothing changed, redone when interrupted.
#
#   VENV=.venv           where the environment lives (default: .venv in the repository)
#   STAGES="cold_start"  whose requirements to install (default: both stages, in one environment)
#   MACHINE=cpu|gpu      overrides the look at the machine
#   PYTHON=python3.12    overrides the search for an interpreter (3.11 or newer)
#   TORCH_CPU_INDEX=URL  a mirror of PyTorch's index of CPU builds
#
# On a GPU machine this is a plain installation of the requirement files. On a CPU machine torch goes first and pinned,
# and torchvision without its dependencies, so that no CUDA packages are pulled in.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$(realpath -m "${VENV:-$ROOT/.venv}")"
STAGES="${STAGES:-cold_start dual_rl}"
STATE="$VENV/.setup" # made_here, unfinished, and one stamp for each installed part
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
INDEX_ARGS=()

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

detect_machine() {
    if [[ -n "${MACHINE:-}" ]]; then
        echo "$MACHINE"
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU' || compgen -G '/proc/driver/nvidia/gpus/*' >/dev/null; then
        echo gpu
    else
        echo cpu
    fi
}

# The files of one part ("tooling" or a stage's folder) that pip reads, one a line.
requirement_file() {
    local stage="$1"
    if [[ "$stage" == tooling ]]; then
        echo "$ROOT/.ci/requirements.txt"
    elif [[ "$KIND" == cpu && -f "$ROOT/$stage/requirements-cpu.txt" ]]; then
        echo "$ROOT/$stage/requirements-cpu.txt"
    else
        echo "$ROOT/$stage/requirements.txt"
    fi
}

stamp_of() {
    {
        echo "$KIND"
        cat "${BASH_SOURCE[0]}" "$ROOT/.ci/torchvision_cpu_ops.py" "$(dirname "$(requirement_file "$1")")"/requirements*.txt
    } | sha256sum
}

is_current() {
    local part
    [[ ! -e "$STATE/unfinished" && -x "$VENV/bin/python" ]] || return 1
    for part in "${PARTS[@]}"; do
        [[ "$(cat "$STATE/$part.stamp" 2>/dev/null)" == "$(stamp_of "$part")" ]] || return 1
    done
}

# The interpreter that virtual environments are made from; prefers the version that everything was tested with.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        "$candidate" -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11); print(sys._base_executable)' \
            2>/dev/null && return
    done
    die "no usable Python >= 3.11 among: ${PYTHON:-python3.11 python3.12 python3.13 python3 python}." \
        "Install one with its venv module (Debian, Ubuntu: apt install python3.11-venv), or set PYTHON=/path/to/python"
}

# uv does not read pip's settings; an index or wheel folder that was set for pip is meant for it as well.
share_pip_settings_with_uv() {
    [[ -z "${PIP_INDEX_URL:-}" ]] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    [[ -z "${PIP_EXTRA_INDEX_URL:-}" ]] || export UV_INDEX="${UV_INDEX:-$PIP_EXTRA_INDEX_URL}"
    [[ -z "${PIP_FIND_LINKS:-}" ]] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
    [[ -z "${PIP_CERT:-}" ]] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
}

make_venv() {
    local python=""
    if [[ -e "$STATE/unfinished" ]]; then
        say "the last set-up was interrupted: starting again"
        rm -rf "$VENV"
    elif "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    elif [[ -e "$STATE/made_here" ]]; then
        say "the environment in $VENV no longer works: making it anew"
        rm -rf "$VENV"
    elif [[ -e "$VENV" ]]; then
        die "$VENV exists but is not a virtual environment with pip that this script made. Move it away or set VENV"
    fi
    [[ "$INSTALLER" == uv ]] || python="$(find_python)"
    mkdir -p "$STATE"
    touch "$STATE/made_here" "$STATE/unfinished"
    say "making $VENV with ${python:-uv}"
    if [[ "$INSTALLER" == uv ]]; then
        uv venv --quiet --allow-existing --seed --python "${PYTHON:-3.11}" "$VENV"
    else
        "$python" -m venv "$VENV"
    fi
}

install() {
    if [[ "$INSTALLER" == uv ]]; then
        uv pip install --quiet --python "$VENV/bin/python" "${INDEX_ARGS[@]}" "$@"
    else
        "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "${INDEX_ARGS[@]}" "$@"
    fi
}

torch_cpu_index_answers() {
    "$VENV/bin/python" - "$TORCH_CPU_INDEX/torch/" >/dev/null 2>&1 <<'PYTHON'
import os, sys, threading, urllib.request

deadline = threading.Timer(5, os._exit, [1])  # name resolution knows no time-out of its own
deadline.daemon = True
deadline.start()
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
}

install_cpu_torch() {
    local pins="$ROOT/cold_start/requirements.txt"
    if torch_cpu_index_answers; then
        say "installing PyTorch from its CPU index"
        if [[ "$INSTALLER" == uv ]]; then
            INDEX_ARGS=(--index "$TORCH_CPU_INDEX" --index-strategy unsafe-best-match)
        else
            INDEX_ARGS=(--extra-index-url "$TORCH_CPU_INDEX")
        fi
    else
        say "installing PyTorch (its CPU index does not answer: from where $INSTALLER finds it)"
    fi
    install "$(grep -m 1 '^torch==' "$pins")"
    install --no-deps "$(grep -m 1 '^torchvision==' "$pins")"
}

finish_cpu() {
    local package site
    # Their package-index builds do not load against CPU torch, and what asks for them runs without.
    for package in torchaudio torchcodec; do
        if compgen -G "$VENV/lib/python3*/site-packages/$package-*.dist-info" >/dev/null; then
            if [[ "$INSTALLER" == uv ]]; then
                uv pip uninstall --quiet --python "$VENV/bin/python" "$package"
            else
                "$VENV/bin/python" -m pip uninstall -qq --yes "$package"
            fi
        fi
    done
    site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp "$ROOT/.ci/torchvision_cpu_ops.py" "$site/"
    echo 'import torchvision_cpu_ops; torchvision_cpu_ops.install()' >"$site/torchvision_cpu_ops.pth"
}

install_everything() {
    local part files=()
    rm -f "$STATE"/*.stamp
    mkdir -p "$STATE"
    [[ ! -e "$STATE/made_here" ]] || touch "$STATE/unfinished"
    [[ "$KIND" != cpu ]] || install_cpu_torch
    for part in "${PARTS[@]}"; do
        files+=(-r "$(requirement_file "$part")")
    done
    say "installing the requirements of: ${PARTS[*]} (some minutes the first time)"
    install "${files[@]}"
    [[ "$KIND" != cpu ]] || finish_cpu
    say "checking that it imports"
    "$VENV/bin/python" -c '
import torch, torchvision
from transformers import Qwen3VLProcessor
print(f"setup: ready, torch {torch.__version__}, torchvision {torchvision.__version__}")'
    for part in "${PARTS[@]}"; do
        stamp_of "$part" >"$STATE/$part.stamp"
    done
    rm -f "$STATE/unfinished"
}

main() {
    local stage
    KIND="$(detect_machine)"
    [[ "$KIND" == cpu || "$KIND" == gpu ]] || die "MACHINE is '$KIND'; it must be cpu or gpu"
    PARTS=(tooling)
    for stage in $STAGES; do
        [[ -f "$ROOT/$stage/requirements.txt" ]] || die "STAGES names '$stage', which has no requirements.txt"
        PARTS+=("$stage")
    done
    if is_current; then
        return
    fi
    if command -v flock >/dev/null; then
        exec 9<"$ROOT" # a second set-up that starts meanwhile waits here, and then finds everything done
        flock --nonblock 9 || { say "waiting for another set-up in this folder" && flock 9; }
    fi
    if is_current; then
        return
    fi
    INSTALLER=pip
    if command -v uv >/dev/null; then
        INSTALLER=uv
        share_pip_settings_with_uv
    fi
    say "preparing an environment for a $KIND machine"
    make_venv
    install_everything
    if ! command -v c++ >/dev/null || ! command -v gcc >/dev/null; then
        say "note: no C++ compiler found (gcc); DeepSpeed needs one to run several processes on a CPU"
    fi
}

main "$@"
