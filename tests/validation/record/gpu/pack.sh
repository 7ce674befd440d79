#!/usr/bin/env bash
# Packs vLLM and what it imports into one archive for a GPU machine that has PyTorch and no network (see README.md).
#   bash pack.sh ARCHIVE.tar.xz [VLLM_WHEEL]        on any x86-64 Linux with Python, pip, unzip and xz; 2 minutes
set -euo pipefail
version=0.26.0 architecture=90 # Hopper
here=$(cd "$(dirname "$0")" && pwd) archive=$(realpath "$1") wheel=${2:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/site" "$work/wheels"
options=(--quiet --only-binary=:all: --no-deps --python-version 3.12 --implementation cp --dest "$work/wheels")
for glibc in 34 31 28 27 24 17; do options+=(--platform "manylinux_2_${glibc}_x86_64"); done
options+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python3 -m pip download "${options[@]}" -r "$here/requirements.txt"
if [ -n "$wheel" ]; then cp "$wheel" "$work/wheels"; else python3 -m pip download "${options[@]}" "vllm==$version"; fi
for each in "$work"/wheels/*.whl; do unzip -q -o "$each" -d "$work/site"; done
cd "$work/site"
# Not used by one Hopper GPU with bf16 weights and no server.
rm -rf vllm/vllm-rs vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4} vllm/vllm_flash_attn/{_vllm_fa2_C.abi3.so,cute} \
  vllm/_flashmla*.so vllm/_qutlass_C.abi3.so vllm/_rust_tool_parser.abi3.so vllm-*.dist-info/RECORD \
  vllm/entrypoints/serve/instrumentator/static vllm/distributed/kv_transfer/*.jpg xgrammar/lib/*.a tvm_ffi/3rdparty
for library in vllm/_C_stable_libtorch.abi3.so vllm/_moe_C_stable_libtorch.abi3.so vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so; do
  python3 "$here/slim.py" "$library" "$architecture"
done
find . -name __pycache__ -prune -exec rm -rf {} +
tar cf - --owner=0 --group=0 . | xz -9 -T0 > "$archive"
ls -l "$archive"
