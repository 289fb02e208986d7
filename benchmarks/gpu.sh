#!/bin/bash
# Published shapes with random weights on a CUDA GPU: compiled, dense against routed against peers, in bf16. One part per call,
# each within ten minutes; every part writes bench-gpu-PART.json into $OUT, with the machine's name in it.
#
#   benchmarks/gpu.sh sd3          # SD3.5-Medium 1024 x 1024
#   benchmarks/gpu.sh flux         # FLUX.1-dev 1024 x 1024
#   benchmarks/gpu.sh qwen         # Qwen-Image 1328 x 1328
#   benchmarks/gpu.sh pixart       # PixArt-Sigma 1024 x 1024, batch 1 and 8, and batch 1 as CUDA graphs
#   benchmarks/gpu.sh hunyuan3d    # Hunyuan3D-2.0 (needs hy3dgen)
#   benchmarks/gpu.sh scaling      # latency and memory against tokens, blocks, batch and steps
#   benchmarks/gpu.sh budgets      # asked against realised: speedup= and latency_ms=
#
# TINY=1 runs the same lines on small shapes, on whatever device there is: to see that a part works before it is sent away.
# STEPS and ROUNDS change how long it takes.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error
steps=${STEPS:-10} rounds=${ROUNDS:-7}
small=() compile=(--compile) graphs=(--cuda-graphs)
if [ -n "${TINY:-}" ]; then
    small=(--blocks 2 --tokens 64 --dtype float32) steps=4 rounds=2 compile=() graphs=()
fi

# Arguments: the name in the file, the preset, further options.
measure() {
    local name=$1 preset=$2
    shift 2
    python3 -m shivelight bench --backbone "$preset" --random-weights --steps "$steps" --rounds "$rounds" \
        "${compile[@]}" "${small[@]}" "$@" --json "$OUT/bench-gpu-$name.json"
}

peers=(--peers first-block-cache taylorseer token-merging)
case ${1:?give a part: sd3, flux, qwen, pixart, hunyuan3d, scaling or budgets} in
sd3) measure sd3 sd35-medium --batch 2 --keep 0.8 0.6 --compute 0.6 0.5 "${peers[@]}" ;;
flux) measure flux flux1-dev --keep 0.8 0.6 --compute 0.76 0.6 0.5 "${peers[@]}" ;;
qwen) measure qwen qwen-image --compute 0.6 0.5 --keep 0.6 "${peers[@]}" ;;
pixart)
    measure pixart pixart-sigma-1024 --batch 2 --keep 0.8 --compute 0.83 0.6 "${peers[@]}"
    # Peers look at the data, which a graph cannot.
    measure pixart-graphs pixart-sigma-1024 --batch 2 --keep 0.8 --compute 0.83 0.6 "${graphs[@]}"
    measure pixart-8 pixart-sigma-1024 --batch 16 --keep 0.8 --compute 0.83 0.6
    ;;
hunyuan3d) measure hunyuan3d hunyuan3d-2 --batch 2 --compute 0.6 0.5 ;;
scaling) python3 benchmarks/scaling.py ${TINY:+--tiny} --out "$OUT/scaling-gpu.json" ;;
budgets) python3 benchmarks/budgets.py ${TINY:+--rounds 2} --out "$OUT/budgets-gpu.json" ;;
*)
    echo "unknown part $1" >&2
    exit 2
    ;;
esac
