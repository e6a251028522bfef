#!/usr/bin/env bash
# Make the virtual environment of the project. Instant when nothing changed; an interrupted set-up starts again.
#
#   VENV=.venv           the environment's folder (default: .venv in the repository)
#   STAGES="cold_start"  whose requirements to install (default: both stages, in one environment)
#   MACHINE=cpu|gpu      default: what the machine has
#   PYTHON=python3.12    the interpreter (default: the first of 3.11 or newer, or the one that uv finds)
#   TORCH_CPU_INDEX=URL  a mirror of PyTorch's index of CPU builds
#
# uv installs everything. Where it looks for packages is what pip is configured to (a mirror, a folder of wheels).
set -euo pipefail
export UV_SYSTEM_CERTS=1 # as pip does

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$(realpath -m "${VENV:-$ROOT/.venv}")"
STAGES="${STAGES:-cold_start dual_rl}"
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
STATE="$VENV/.setup" # marks an environment as made here; its file `installed` is the fingerprint of a finished set-up

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

fingerprint() {
    { echo "$MACHINE $STAGES" && cat "$0" "$ROOT"/.ci/torchvision_cpu_ops.py "$ROOT"/{.ci,*}/requirements*.txt; } | sha256sum
}

is_current() { [[ "$(cat "$STATE/installed" 2>/dev/null)" == "$(fingerprint)" && -x "$VENV/bin/python" ]]; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        "$candidate" -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11); print(sys._base_executable)' \
            2>/dev/null && return
    done
}

make_venv() {
    local python
    if [[ -e "$STATE/installed" ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        rm "$STATE/installed"
        return
    elif [[ -e "$STATE" ]]; then
        say "the environment in $VENV is unfinished or broken: making it anew"
        rm -rf "$VENV"
    elif [[ -e "$VENV" ]]; then
        die "$VENV was not made by this set-up. Move it away or set VENV."
    fi
    python="$(find_python || true)"
    mkdir -p "$STATE"
    say "making $VENV with ${python:-uv}"
    if [[ -n "$python" ]]; then
        "$python" -m venv "$VENV"
    elif command -v uv >/dev/null; then
        UV_PYTHON="${PYTHON:-${UV_PYTHON:-3.11}}" uv venv --quiet --allow-existing --seed "$VENV"
    else
        rm -rf "$VENV"
        die "no Python >= 3.11 with its venv module was found. Install one (apt install python3-venv) or set PYTHON."
    fi
}

# uv does not read pip's configuration. UV_* variables that are set already win, then PIP_* variables, then files.
share_pip_configuration() {
    local configuration section key value
    configuration="$("$VENV/bin/python" -m pip config list)"
    for section in :env: install global; do
        while IFS== read -r key value; do
            value="$(xargs <<<"${value//\\n/ }" | xargs)" # pip prints it in quotes, with \n between lines
            case "$key" in
                "$section.index-url") export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}" ;;
                "$section.extra-index-url") export UV_INDEX="${UV_INDEX:-$value}" ;;
                "$section.find-links") export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}" ;;
                "$section.constraint") export UV_CONSTRAINT="${UV_CONSTRAINT:-$value}" ;;
                "$section.trusted-host") export UV_INSECURE_HOST="${UV_INSECURE_HOST:-$value}" ;;
                "$section.cert") export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
            esac
        done <<<"$configuration"
    done
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" # the best version of all indexes, as pip does
}

install_requirements() {
    local stage site arguments=(-r "$ROOT/.ci/requirements.txt")
    for stage in $STAGES; do
        if [[ "$MACHINE" == cpu && -f "$ROOT/$stage/requirements-cpu.txt" ]]; then
            arguments+=(-r "$ROOT/$stage/requirements-cpu.txt")
        else
            arguments+=(-r "$ROOT/$stage/requirements.txt")
        fi
    done
    if [[ "$MACHINE" == cpu ]]; then
        # PyPI has no builds of these two for CPU torch, and what asks for them runs without.
        printf 'torchaudio\ntorchcodec\n' >"$STATE/excludes.txt"
        arguments+=(--excludes "$STATE/excludes.txt")
        if timeout 5 "$VENV/bin/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1])' \
            "$TORCH_CPU_INDEX/torch/" 2>/dev/null; then
            arguments+=(--index "$TORCH_CPU_INDEX")
        else
            say "PyTorch's CPU index does not answer: torch comes from where pip is configured to look"
        fi
        site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        cp "$ROOT/.ci/torchvision_cpu_ops.py" "$site/"
        echo 'import torchvision_cpu_ops; torchvision_cpu_ops.install()' >"$site/torchvision_cpu_ops.pth"
    fi
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$(grep '^uv==' "$ROOT/.ci/requirements.txt")"
    "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" "${arguments[@]}"
}

start() { "$VENV/bin/python" "$@" 2>&1 9<&-; }

check() { # what must start, and the arguments of Python that start it
    local output # a first start compiles bytecode: on a busy machine Ray gives up waiting, and a second try decides
    output="$(start "${@:2}")" || output="$(start "${@:2}")" || die "$1 does not start from $VENV:"$'\n'"$output"
}

main() {
    local stage
    MACHINE="${MACHINE:-$(nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)}"
    [[ "$MACHINE" == cpu || "$MACHINE" == gpu ]] || die "MACHINE is '$MACHINE'. It must be cpu or gpu."
    for stage in $STAGES; do
        [[ -f "$ROOT/$stage/requirements.txt" ]] || die "STAGES names '$stage', which has no requirements.txt."
    done
    is_current && return
    exec 9<"$ROOT" # a second set-up waits here and then finds everything done
    flock --nonblock 9 || { say "waiting for another set-up in this repository" && flock 9; }
    is_current && return
    make_venv
    share_pip_configuration
    say "installing the requirements of $STAGES for a $MACHINE machine (minutes the first time)"
    install_requirements
    say "checking that everything starts"
    check "Qwen3-VL's processor" -c 'from transformers import Qwen3VLProcessor'
    [[ " $STAGES " != *" cold_start "* ]] || check "DeepSpeed's launcher" -m deepspeed.launcher.runner --help
    if [[ " $STAGES " == *" dual_rl "* ]]; then
        check Ray -c 'import ray; ray.init(num_cpus=1, include_dashboard=False)'
        check vLLM -c 'import vllm'
    fi
    fingerprint >"$STATE/installed"
    say "ready"
}

main
