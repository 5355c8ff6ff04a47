#!/usr/bin/env bash
# Installs the project with its pinned dependencies, as the images do.
#
#   install.sh dependencies VENV    makes the virtual environment with all that the project needs; minutes
#   install.sh project VENV         builds the project's wheel and puts it in
#
# The first reads pyproject.toml and constraints.txt only, so that an image keeps it while the sources change.
set -euo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    cat <<'TEXT'
environment:
  PYTHON           which makes the virtual environment (python3)
  TORCH_INDEX      where torch comes from, if not from where all else does: one for CPUs, others for versions of CUDA
  EXTRAS           of the project, such as "lora align" (none)
  DEPENDENCIES_OF  a Python whose packages are used instead of installing any
TEXT
}

[ $# -eq 2 ] || { usage >&2 && exit 2; }
step=$1
mkdir -p "$2"
venv=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

case $step in
    dependencies)
        "${PYTHON:-python3}" -m venv "$venv"
        if [ -n "${DEPENDENCIES_OF:-}" ]; then
            # A path line runs none of the .pth files that lie there, so that an editable install there is not seen.
            site='import sysconfig; print(sysconfig.get_path("purelib"))'
            "$DEPENDENCIES_OF" -c "$site" >"$("$venv/bin/python" -c "$site")/dependencies.pth"
        else
            if [ -n "${TORCH_INDEX:-}" ]; then
                pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" \
                    "torch==$(sed -n 's/^torch==//p' constraints.txt)+${TORCH_INDEX##*/}"
            fi
            EXTRAS=${EXTRAS:-} "$venv/bin/python" -c '
import os, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [project["optional-dependencies"][name] for name in os.environ["EXTRAS"].split()]
print(*project["dependencies"], *sum(extras, []), sep="\n")' >"$venv/requirements.txt"
            pip install --no-cache-dir --constraint constraints.txt --requirement "$venv/requirements.txt"
        fi
        ;;
    project)
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        rm -rf build # or files deleted since the last build would be packed
        pip wheel --no-deps --wheel-dir "$scratch" .
        pip install --no-deps --no-index --force-reinstall "$scratch"/*.whl
        ;;
    *) usage >&2 && exit 2 ;;
esac
