#!/usr/bin/env bash
# Records a plan on a GPU machine with what pack.sh made.
#   bash run.sh ARCHIVE.tar.xz OUT PLAN GPU SECONDS [more options of the recorder]
# ARCHIVE may be in parts: ARCHIVE.tar.xz.00, .01 ... OUT gets recording.tar.xz, and cache.tar.xz with compiled kernels:
# beside ARCHIVE it makes a later start faster. PYTHON: the Python that has PyTorch.
set -uo pipefail
begin=$(date +%s) python=${PYTHON:-python3}
archive=$(realpath "$1") out=$(mkdir -p "$2" && realpath "$2") plan=$3 gpu=$4 seconds=$5
shift 5
state=${STATE:-/tmp/servesim-record}
site=$state/site cache=$state/cache
if [ ! -e "$site/.unpacked" ]; then
  mkdir -p "$site" "$cache"
  cat "$archive"* | tar xJf - -C "$site" && touch "$site/.unpacked"
  kept=$(dirname "$archive")/cache.tar.xz
  if [ -e "$kept" ]; then tar xJf "$kept" -C "$cache"; fi
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export VLLM_CACHE_ROOT=$cache TRITON_CACHE_DIR=$cache/triton
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo DO_NOT_TRACK=1
cd "$(dirname "$0")/../.." || exit 1
left=$((seconds - ($(date +%s) - begin) - 25)) # packing what comes back takes a while
"$python" -m record --plan "$plan" --gpu "$gpu" --out "$state/runs" --budget-s "$left" "$@" 2>&1 | tee "$state/record.log"
tar cJf "$out/recording.tar.xz" -C "$state" runs record.log
if [ -n "$(ls -A "$cache")" ]; then tar cJf "$out/cache.tar.xz" -C "$cache" .; fi
ls -l "$out"
