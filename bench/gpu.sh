#!/usr/bin/env bash
# Everything that needs a GPU, in one command: bash bench/gpu.sh [FOLDER]
# Builds the extension in place where it is not, then ceilings, ops, layers, whole models and peak memory, each behind
# its gate, into bench/results/DATE-gpu.json, a day's second run into DATE-gpu_02.json. Under nine minutes; nothing is
# fetched. Every part has a time limit and writes each case as it is finished, so that a part that fails or runs out of
# time costs neither its earlier cases nor the later parts. In a copy without .git set PETUNE_COMMIT to its commit.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=${1:-bench/results}
PARTS=$(mktemp -d)
STEM="$FOLDER/$(date +%Y-%m-%d)-gpu"
RUN=1
RESULT="$STEM.json"
while [ -e "$RESULT" ]; do # sorts behind the one before
    RUN=$((RUN + 1))
    RESULT="${STEM}_$(printf %02d "$RUN").json"
done
FAILED=0
BUDGET=520 # seconds for all of it
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MAX_JOBS=${MAX_JOBS:-$(nproc)}
command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || export PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "$FOLDER"

part() { # seconds, then the command; a failure is shown, and the next part runs
    local limit=$1 left=$((BUDGET - SECONDS))
    shift
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "== no time left for: $*" && FAILED=1
        return
    fi
    echo "== $* (at most ${limit} s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" || { echo "== exit $?: $*" && FAILED=1; }
}

if ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "PyTorch sees no NVIDIA GPU" >&2
    exit 2
fi
# whatever ends this, what was measured is put together
trap '"$PYTHON" -m bench collect "$PARTS" "$RESULT" && echo "result  $RESULT" || exit 1' EXIT
built() { "$PYTHON" -c "from petune_kernels import backends as b; import sys; sys.exit(any(b.MISSING.values()))" 2>/dev/null; }
# two minutes where nothing was built before
if ! built && ! FORCE_CUDA=1 timeout 180 "$PYTHON" setup.py -q build_ext --inplace; then
    echo "== the build failed: Triton's kernels serve where there are any, and the results say so" >&2
    FAILED=1
fi
part 60 "$PYTHON" -m petune_kernels.cli doctor

BENCH=("$PYTHON" -m bench)
COMMON=(--device cuda --dtype bfloat16 --out "$PARTS")
# what has a target first, what compiles last
part 45 "${BENCH[@]}" models --shape bert-base --batch 32 --length 512 --rounds 9 --no-saved \
    --regime layernorm --regime "lora-all p=0.1" "${COMMON[@]}"
part 75 "${BENCH[@]}" models --shape bert-base --batch 16 --length 128 --rounds 9 --no-saved --cuda-graphs --trainer 20 \
    --regime layernorm --regime "lora-all p=0.1" "${COMMON[@]}"
part 100 "${BENCH[@]}" ops --width bert-base --batch 32 --length 512 --rounds 9 --op residual_norm --op bias_act \
    --op column_sum --op lora_linear --op dropout --op packed_linear "${COMMON[@]}"
part 45 "${BENCH[@]}" models --shape roberta-large --batch 32 --length 512 --rounds 5 --no-saved \
    --regime layernorm --regime "lora-all p=0.1" "${COMMON[@]}"
part 40 "${BENCH[@]}" models --shape bert-base --batch 32 --length 512 --rounds 3 --no-saved --memory \
    --regime layernorm --regime "lora-all p=0.1" "${COMMON[@]}"
part 45 "${BENCH[@]}" ops --width llama --batch 4 --length 4096 --rounds 7 --op residual_norm "${COMMON[@]}"
part 75 "${BENCH[@]}" models --shape bert-base --batch 32 --length 128 --rounds 9 --no-saved --cuda-graphs --trainer 20 \
    --regime bitfit --regime "lora-qv p=0.1" "${COMMON[@]}"
part 50 "${BENCH[@]}" overhead --device cuda --out "$PARTS"
part 60 "${BENCH[@]}" layers --shape bert-base --batch 32 --length 512 --rounds 9 --compile \
    --regime layernorm "${COMMON[@]}"
part 300 "${BENCH[@]}" models --shape bert-base --batch 32 --length 512 --rounds 9 --no-saved --compile \
    --compile-mode reduce-overhead --regime layernorm "${COMMON[@]}"
exit "$FAILED"
