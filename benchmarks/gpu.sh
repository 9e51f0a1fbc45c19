#!/usr/bin/env bash
# What only a GPU shows, in ten minutes: nccl, bf16 and fp16 engines, kills and resumes on the device,
# every route of the endpoint, and speed.
#
#   benchmarks/gpu.sh [PART…]        doctor tests pretrain routes step compiled data load; all by default
#
# OUT is the folder of the results (gpu-results), PYTHON the interpreter (python3). The script goes on
# after a part that fails, and its exit status is the number of those. Without a GPU the same commands
# run on the CPU, tiny, to try the script.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-gpu-results} work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONUNBUFFERED=1 RAY_DEDUP_LOGS=0 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
device=$($python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
mimray() { "$python" -m service "$@"; }

# Rows of a run's metrics.
rows() { cat "$1/metrics.jsonl" 2>/dev/null | wc -l; }

part_doctor() { mimray doctor --storage "$work"; }

part_tests() { timeout 330 "$python" -m pytest -m gpu -q --durations 8 -p no:cacheprovider --timeout 200 tests/trainers/test_gpu.py tests/trainers/methods/test_selfdistil.py; }

# ZeRO 1 and 3 through Ray Train; a SIGKILL of the worker, which Ray starts again, and the losses
# of an undisturbed run beside it.
part_pretrain() {
    mimray data sample "$work/pictures" --size 64 || return
    # Long enough on either device for the kill to come while it trains.
    local stage status=0 steps=60
    [ "$device" = cpu ] || steps=1500
    for stage in 1 3; do
        local set=(--steps $steps --set engine.zero_stage=$stage --set engine.precision=bf16
                   --set optim.batch_size=32 --set checkpoint.every_steps=20 --set logging.every_steps=1 --set data.num_workers=2)
        mimray pretrain mae-tiny --data "$work/pictures" --storage "$work/runs" --name whole$stage "${set[@]}" || status=1
        mimray pretrain mae-tiny --data "$work/pictures" --storage "$work/runs" --name killed$stage "${set[@]}" &
        local driver=$!
        until [ "$(rows "$work/runs/killed$stage")" -ge 30 ] || ! kill -0 $driver 2>/dev/null; do sleep 0.2; done
        if "$python" benchmarks/kill_workers.py $driver; then
            echo "killed at row $(rows "$work/runs/killed$stage") of $steps"
        else
            status=1
        fi
        wait $driver || status=1
        "$python" benchmarks/gpu.py same "$work/runs/whole$stage" "$work/runs/killed$stage" || status=1
    done
    return $status
}

part_routes() { "$python" benchmarks/gpu.py routes "$work" --device "$device"; }
part_step() { "$python" benchmarks/gpu.py step --json "$out/step.json"; }
part_compiled() { "$python" benchmarks/gpu.py step --compiled --json "$out/compiled.json"; }
part_data() { "$python" benchmarks/gpu.py data "$work" --json "$out/data.json"; }
part_load() { "$python" benchmarks/gpu.py load "$work" --json "$out/load.json"; }

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(doctor tests pretrain routes step compiled data load)
for part in "${parts[@]}"; do
    began=$SECONDS
    ("part_$part") >"$out/$part.txt" 2>&1 </dev/null
    status=$?
    [ $status = 0 ] || failed=$((failed + 1))
    echo "$part: exit $status after $((SECONDS - began)) s"
    tail -n "${LINES_SHOWN:-12}" "$out/$part.txt" | cut -c1-300
done
exit $failed
