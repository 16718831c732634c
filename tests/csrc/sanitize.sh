#!/bin/sh
# Replays the same random calls of the paged cache each time, under AddressSanitizer with UndefinedBehaviorSanitizer
# and, with several threads, under ThreadSanitizer; and attention at many sizes under the first two. (ThreadSanitizer
# does not know OpenMP's barriers.) The calls come from the extension, which has to be built; CXX is the compiler, g++ by
# default.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m tests.csrc.cache_machine "$folder/traces"

cache="csrc/block_allocator.cpp csrc/paged_cache.cpp csrc/kv_memory_cpu.cpp csrc/kv_memory_no_cuda.cpp
    csrc/paged_attention.cpp tests/csrc/replay.cpp"
attention="csrc/encoder_attention.cpp csrc/latent_cross_attention.cpp tests/csrc/attention_check.cpp"

build() { # NAME SOURCES OPTION...
    name=$1 sources=$2
    shift 2
    # shellcheck disable=SC2086  # sources are words
    "${CXX:-g++}" -std=c++17 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wconversion -Wno-psabi -Werror \
        "$@" $sources -pthread -o "$folder/$name"
}

echo "AddressSanitizer, UndefinedBehaviorSanitizer"
# With the library's own checks: an index past the end of a vector's elements but within its memory is one too.
checks="-fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
# shellcheck disable=SC2086  # checks are words
build address "$cache" $checks
ASAN_OPTIONS=detect_leaks=1 "$folder/address" "$folder"/traces/*.trace
# shellcheck disable=SC2086
build attention "$attention" $checks -fopenmp
"$folder/attention"

echo "ThreadSanitizer"
build thread "$cache" -fsanitize=thread
TSAN_OPTIONS=halt_on_error=1 "$folder/thread" --threads 3 "$folder"/traces/*.trace
