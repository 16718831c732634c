#!/usr/bin/env bash
# Everything that needs a GPU, for a machine with system Python and PyTorch and no network:
#
#     bash bench/gpu.sh tests   OUTDIR    the tests marked gpu, and compute-sanitizer on small ones of all device code
#     bash bench/gpu.sh kernels OUTDIR    Triton kernels against PyTorch and the chip; the cache against the memory
#     bash bench/gpu.sh engine  OUTDIR    lines a second, milliseconds a line against transformers; the cross memories
#
# Each stage takes under nine minutes and writes as it goes, so that a run cut short leaves what it had. OUTDIR gets at
# most eight files; what is not a log or an XML file belongs into bench/results/.
set -uo pipefail
stage=${1:?"expected tests, kernels or engine"}
out=$(realpath -m "${2:?"expected a folder for the results"}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
exec > >(tee "$out/$stage.log") 2>&1

run() { # SECONDS COMMAND...: the command under a time limit; says how it ended, and goes on
  local limit=$1 start=$SECONDS left=$((520 - SECONDS))
  shift
  echo "== $*"
  if [ $left -lt 10 ]; then
    echo "== no time left"
    failed=1
    return
  fi
  [ "$limit" -lt $left ] || limit=$left
  timeout --kill-after=10 "$limit" "$@"
  local code=$?
  echo "== exit $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || failed=1
}

failed=0
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
python3 -m pip list 2>/dev/null | grep -iE "^(torch|triton|transformers|setuptools|pybind11) "
run 120 env TROCR_FAST_CUDA=1 TROCR_FAST_CUDA_ARCHITECTURES="${TROCR_FAST_CUDA_ARCHITECTURES:-90}" \
  python3 -m pip install --quiet --break-system-packages --no-build-isolation --no-deps --editable .
[ $failed -eq 0 ] || exit 1
export PYTHONPATH=$PWD
python3 -c "from trocr_fast import _csrc; print('build:', _csrc.BUILD)"

case $stage in
  tests)
    # Six processes: Triton compiles, and the CPU draws inputs, in parallel; their fp64 references fit the memory.
    run 300 python3 -m pytest -n 6 -m gpu -p no:cacheprovider --junit-xml="$out/tests.xml" \
      tests/csrc tests/kernels tests/parity tests/test_{paged_cache,recording,lanes,generate,sampling,bench_kernels}.py
    # Each allocation of its own, or a write past a tensor's end lands in torch's pool unseen. The CUDA kernels of csrc
    # use no shared memory, which is all that racecheck looks at: it is for the Triton kernels.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
      run 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 -m pytest -m gpu -p no:cacheprovider tests/csrc/test_kv_memory.py tests/test_bench_kernels.py \
        -k "cuda_leaves or outside or permute_tables or ours_on_a_gpu"
    done
    ;;
  kernels)
    run 120 python3 -m bench.compile --native --dtype bf16 --jobs "$(nproc)"
    run 300 python3 -m bench.kernels --budget-seconds 270 --out "$out"
    run 180 python3 -m bench.paged_cache
    cp bench/results/paged_cache_gpu.json "$out/"
    ;;
  engine)
    # Each begins nothing after its budget; a compilation that is under way then may take the rest of its limit.
    lines_a_second() { # SECONDS OPTION...
      run "$1" python3 -m bench.throughput --device cuda --batch 64 256 --budget-seconds $(($1 - 30)) "${@:2}"
      cp bench/results/throughput_gpu.{json,png} "$out/"
    }
    lines_a_second 120 --config base --lengths iam --lines 512 --repeats 2
    lines_a_second 80 --config small --lengths iam --lines 512 --repeats 2
    run 70 python3 -m bench.latency --device cuda --config base small builtin --seconds 4 --budget-seconds 50
    cp bench/results/latency_gpu.json "$out/"
    lines_a_second 80 --config base --new-tokens 20 --beams 4 --lines 256 --repeats 2
    lines_a_second 60 --config small --new-tokens 20 --beams 4 --lines 256 --repeats 2
    lines_a_second 50 --config builtin
    run 90 python3 -m bench.cross_memory
    cp bench/results/cross_memory_gpu.json "$out/"
    ;;
  *)
    echo "stage: expected tests, kernels or engine, got $stage"
    exit 2
    ;;
esac
exit $failed
