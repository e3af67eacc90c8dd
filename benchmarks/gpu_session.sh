#!/usr/bin/env bash
# Runs the GPU tests and all GPU benchmarks, in about eight and a half minutes, without a network:
#
#   benchmarks/gpu_session.sh --out FOLDER --data CIFAR10 [--site LIGHTLY] [--minutes 8.5] [--dry]
#
# FOLDER gets a JSON file for each stage, and session.md with the tables. CIFAR10 is a folder of
# Parquet files; LIGHTLY is a folder with the unpacked package lightly, for the comparison. Needs
# torch, timm, torchvision, numba, opencv, pyarrow, scikit-learn, safetensors and pytest, but neither
# ray nor mlflow. --dry runs everything at toy size on a CPU, as a check of the session itself.
#
# Every stage has a time limit and writes its result at once; a failed stage does not stop the others.
set -u
out="" data="" site="" minutes=8.5 dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2; shift 2 ;;
        --data) data=$2; shift 2 ;;
        --site) site=$2; shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        --dry) dry=--dry; shift ;;
        *) echo "gpu_session.sh: unknown option $1" >&2; exit 2 ;;
    esac
done
if [ -z "$out" ] || [ -z "$data" ]; then
    echo "gpu_session.sh: give --out FOLDER and --data CIFAR10" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$root/platform:$root/benchmarks:$root/experiments${site:+:$site}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
began=$(date +%s)
ends=$(awk -v m="$minutes" -v b="$began" 'BEGIN { printf "%d", b + 60 * m }')

# stage NAME SECONDS COMMAND...: run COMMAND for at most SECONDS or the rest of the session.
stage() {
    local name=$1 limit=$2 left started
    shift 2
    started=$(date +%s)
    left=$((ends - started))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left" | tee -a "$out/session.log"
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit $code after $(($(date +%s) - started)) of $limit s" |
        tee -a "$out/session.log"
    tail -n 25 "$out/$name.log"
}

session="$python $root/benchmarks/gpu_session.py"
cd "$root" || exit 2
# Compile the decoder's kernels while the tests run; the CIFAR-10 stage then finds them in the cache.
$python -c "import cifar10_gpu; cifar10_gpu.load('$data', 500, 32)" >"$out/decoder.log" 2>&1 &
# The tests come first, since the figures are worthless if they fail. Several processes share the card.
if [ -z "$dry" ]; then
    # -v names each test, so that the log of an interrupted session shows which ones passed.
    stage tests 120 $python -m pytest --noconftest -p no:cacheprovider -v --tb=short -n 8 \
        --timeout 100 tests/test_gpu.py
else
    stage tests 110 $python -m pytest --noconftest -p no:cacheprovider -q tests/test_gpu.py
fi
for recipe in mae simclr dino; do
    stage "steps-$recipe" 85 $session steps --recipe $recipe --output "$out/steps-$recipe.json" $dry
done
stage loss 20 $session loss --output "$out/loss.json" $dry
stage batches 60 $session batches --output "$out/batches.json" $dry
left=$((ends - $(date +%s) - 10))
stage cifar $left $session cifar --data "$data" --output "$out/cifar.json" $dry \
    --minutes "$(awk -v s="$left" 'BEGIN { printf "%.2f", (s - 25) / 60 }')"
$session table "$out" >"$out/session.md"
cat "$out/session.md"
