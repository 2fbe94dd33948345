#!/usr/bin/env bash
# All that needs a GPU, in one call of about nine minutes:
#
#     bash experiments/on_gpu.sh OUT            the published geometries, on CUDA
#     bash experiments/on_gpu.sh OUT rehearse   the same commands with small sizes, on a CPU
#
# Each part has a time limit and writes OUT/PART.txt and, but for the tests, OUT/PART.json.
set -u
cd "$(dirname "$0")/.."
out=${1:?a folder for the results is needed}
mkdir -p "$out"
device=cuda geometries=(vicuna-7b mistral-7b qwen2-vl-7b) lengths="8192 16384 32768" num=10 profiled=32768
if [ "${2-}" = rehearse ]; then
    device=cpu geometries=(small-mha small-mha small-mha) lengths="512" num=1 profiled=512
fi

part() {                                                # part SECONDS NAME COMMAND ...
    local seconds=$1 name=$2 start=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit status $?, $((SECONDS - start)) s"
    tail -n 4 "$out/$name.txt"
}
bench() {                                               # bench SECONDS NAME ARGUMENTS ...
    local seconds=$1 name=$2
    shift 2
    part "$seconds" "$name" python experiments/bench.py "$@" --out "$out/$name.json"
}

part 120 tests python -m pytest -q -x test_sparsemm.py -k "cuda or evicted or large or packed or tokens_equal"
for geometry in "${geometries[@]}"; do
    # shellcheck disable=SC2086
    bench 110 "decode-$geometry" decode --geometry "$geometry" --lengths $lengths --budgets 256 \
        --num "$num" --prefill --device $device
done
bench 40 profile profile --geometry "${geometries[0]}" --lengths $profiled --budgets 256 --device $device
bench 60 scoring scoring --num "$num" --device $device
[ $device = cpu ] || bench 60 scoring-vicuna scoring --geometry vicuna-7b --num 2 --dtype bfloat16 --device $device
