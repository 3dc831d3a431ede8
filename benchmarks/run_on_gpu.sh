#!/usr/bin/env bash
# Builds, tests, checks and times on a machine with an NVIDIA GPU and no network; docs/gpu.md.
#
#   bash benchmarks/run_on_gpu.sh [--out FILE] [--budget SECONDS] [--parts A,B] [--installed]
#   bash benchmarks/run_on_gpu.sh --dry-run      every step on this CPU, with tiny shapes
#
# PYTHON names the interpreter (python3), BAGFORMER_RIVAL_WHEELS the folder with the rivals' wheels
# (benchmarks/wheels). Nothing is installed: the package is put together under build/gpu.
set -euo pipefail
started=$(date +%s)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out="" dry="" installed="" words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1; words+=(--dry-run) ;;
        --installed) installed=1 ;;
        --out) out=${2:?--out needs a file}; shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) words+=("$1") ;;
    esac
    shift
done
if [ -z "$out" ]; then
    out="$root/benchmarks/results/gpu.json"
    if [ -n "$dry" ]; then out="$(mktemp -d)/gpu_dry_run.json"; fi
fi
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac

"$python" - <<'PYTHON'
import importlib.util
import sys

wanted = ("torch", "triton", "pybind11", "setuptools", "pytest", "timm", "transformers")
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}; name another with PYTHON=...")
PYTHON

if [ -z "$installed" ]; then
    site="$root/build/gpu/site"
    log="$root/build/gpu/build.log"
    mkdir -p "$site"
    rm -rf "$site"
    # sources that are gone from the checkout must not live on in what was built before
    find "$root/build/gpu" -path '*/make/*' -name '*.py' -delete
    echo "building the extension (log: $log)"
    if ! (cd "$root" && "$python" setup.py -q build --build-base build/gpu/make \
        install_lib --install-dir "$site" install_egg_info --install-dir "$site") > "$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "the build failed; the whole log is $log" >&2
        exit 2
    fi
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" "$root/benchmarks/gpu" "${words[@]+"${words[@]}"}" --out "$out" --started "$started"
