#!/bin/sh
# Prepare this checkout once: a Python >= 3.12, a virtual environment in .venv, the project with its extras, Debian packages.
# SKIP_SYSTEM=1 leaves the system's packages alone; PYTHON=/path/to/python names the interpreter; CRAFT_EXTRAS picks the extras.
set -eu
cd "$(dirname "$0")/.."
extras=${CRAFT_EXTRAS:-lerobot,notebook,sim,dev}
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
good() { "$1" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' </dev/null >/dev/null 2>&1; }

find_python() {
    for p in "${PYTHON:-}" python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python \
        "$HOME"/miniconda3/bin/python "$HOME"/miniforge3/bin/python /opt/conda/bin/python
    do
        [ -n "$p" ] && good "$p" && { "$p" -c 'import sys; print(sys.executable)'; return; }
    done
    have_uv && uv python find --no-project '>=3.12,<3.14' 2>/dev/null && return
    have_uv && uv python install 3.12 >&2 && uv python find --no-project 3.12
}
have_uv() { uv --version </dev/null >/dev/null 2>&1; }

system_packages() {
    [ -z "${SKIP_SYSTEM:-}" ] || return 0
    command -v dpkg-query >/dev/null 2>&1 || { say "not a Debian system: needs Chromium (browser tests) and EGL or OSMesa (simulator)"; return 0; }
    missing=
    for p in libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgbm1 libosmesa6 fonts-dejavu-core; do
        dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
    done
    command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing="$missing chromium"
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as=sudo; else
        die "Debian packages are missing:$missing. Run: sudo apt-get install$missing (or SKIP_SYSTEM=1 to go on without)"
    fi
    say "installing Debian packages:$missing"
    { $as apt-get update -q && $as env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing; } </dev/null >&2 ||
        die "apt-get could not install:$missing. Install them by hand, or SKIP_SYSTEM=1 to go on without"
}

system_packages
py=.venv/bin/python
if ! good $py; then
    base=$(find_python) || die "no Python 3.12 or 3.13 that runs was found. Install one (Debian 13: apt-get install python3-venv; pyenv: pyenv install 3.12; uv: uv python install 3.12), or name it: make PYTHON=/path/to/python"
    say "creating .venv with $("$base" -V)"
    rm -rf .venv
    if have_uv; then uv venv -q --python "$base" .venv
    else
        "$base" -m venv .venv || die "$base cannot create environments: on Debian, apt-get install python3-venv"
        .venv/bin/pip install -q uv || say "uv is not to be had, pip does it (slower)"
    fi
fi
say "installing craft_nb[$extras] into .venv"
if have_uv; then uv pip install -q --python $py -e ".[$extras]"
elif [ -x .venv/bin/uv ]; then .venv/bin/uv pip install -q --python $py -e ".[$extras]"
else $py -m pip install -q -e ".[$extras]"; fi </dev/null
$py -c 'import torch, craft_nb' || die "the installed environment does not import craft_nb: remove .venv and run make again"
touch .venv/.ready
say "ready: $($py -V), torch $($py -c 'import torch; print(torch.__version__)')"
