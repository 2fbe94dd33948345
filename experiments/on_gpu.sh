#!/usr/bin/env bash
# What needs a GPU, in at most nine minutes; `rehearse` runs it with small sizes on a CPU:
#
#     bash experiments/on_gpu.sh OUT [rehearse]
set -u
cd "$(dirname "$0")/.."
out=${1:?a folder for the results is needed} geometries=(vicuna-7b mistral-7b qwen2-vl-7b) pages=2
on=(--device cuda --dtype bfloat16) sizes=(--lengths 8192 16384 32768)
[ "${2-}" = rehearse ] && geometries=(small-mha) pages=1 on=() sizes=(--lengths 512 --num 1)
mkdir -p "$out"
part() {                                                # part SECONDS NAME ARGUMENTS of python ...
    timeout "$1" python "${@:3}" >"$out/$2.txt" 2>&1
    echo "$2: exit status $?, second $SECONDS" && tail -n 8 "$out/$2.txt"
}
part 100 tests -m pytest -q test_sparsemm.py -k "cuda or packed or evicted or precision"
for name in "${geometries[@]}"; do
    part 120 "decode-$name" experiments/bench.py decode --geometry "$name" "${sizes[@]}" \
        "${on[@]}" --prefill --profile --out "$out/decode-$name.json"
done
part 80 scoring experiments/bench.py scoring --num $pages "${on[@]}" --out "$out/scoring.json"
