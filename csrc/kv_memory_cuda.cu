#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kv_memory.h"

namespace trocr_fast::cuda {

namespace {

constexpr int kThreads = 128;
constexpr unsigned kMaxGrid = 65535;  // of the y and z dimensions

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

cudaStream_t as_cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

// The widest piece, in bytes, in which memory can be moved that begins and is strided at multiples of all of `values`.
int piece(std::initializer_list<std::int64_t> values) {
  for (const int bytes : {16, 8, 4}) {
    bool fits = true;
    for (const std::int64_t value : values) fits = fits && value % bytes == 0;
    if (fits) return bytes;
  }
  return 2;
}

std::int64_t address(const void* pointer) { return reinterpret_cast<std::int64_t>(pointer); }

// Runs `launch` with a value of the type that is moved at once.
template <typename Launch>
void with_piece(int bytes, Launch launch) {
  switch (bytes) {
    case 16: return launch(int4{});
    case 8: return launch(int2{});
    case 4: return launch(int{});
    default: return launch(short{});
  }
}

// A block of threads a token: K and V of all heads are contiguous on both sides.
template <typename Piece>
__global__ void write_kernel(KVMemory memory, std::int64_t layer, NewTokens tokens) {
  const std::int64_t pieces = memory.token_bytes() / static_cast<std::int64_t>(sizeof(Piece));
  for (std::int64_t t = blockIdx.x; t < tokens.num_tokens; t += gridDim.x) {
    const std::int64_t slot = tokens.slot_mapping[t];
    if (slot < 0 || slot >= memory.num_slots()) continue;
    for (int side = 0; side < 2; ++side) {
      const unsigned char* from = side == 0 ? tokens.k + t * tokens.k_stride : tokens.v + t * tokens.v_stride;
      const auto* source = reinterpret_cast<const Piece*>(from);
      auto* destination = reinterpret_cast<Piece*>(memory.data + memory.offset(slot, layer, side));
      for (std::int64_t i = threadIdx.x; i < pieces; i += blockDim.x) destination[i] = source[i];
    }
  }
}

// The x dimension runs along a block's bytes, y over the pairs.
template <typename Piece>
__global__ void copy_blocks_kernel(KVMemory memory, const std::int32_t* pairs, std::int64_t num_pairs) {
  const std::int64_t pieces = memory.block_bytes() / static_cast<std::int64_t>(sizeof(Piece));
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t pair = blockIdx.y; pair < num_pairs; pair += gridDim.y) {
    const std::int64_t from = pairs[2 * pair], to = pairs[2 * pair + 1];
    if (from < 0 || from >= memory.num_blocks || to < 0 || to >= memory.num_blocks) continue;
    const auto* source = reinterpret_cast<const Piece*>(memory.data + from * memory.block_bytes());
    auto* destination = reinterpret_cast<Piece*>(memory.data + to * memory.block_bytes());
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pieces; i += step) {
      destination[i] = source[i];
    }
  }
}

// A block of threads a row and key; neighbouring threads read neighbouring bytes of the token.
template <typename Piece>
__global__ void gather_kernel(KVMemory memory, std::int64_t layer, Rows rows, unsigned char* k, unsigned char* v) {
  const std::int64_t head_pieces = memory.head_bytes() / static_cast<std::int64_t>(sizeof(Piece));
  const std::int64_t pieces = memory.num_heads * head_pieces;
  for (std::int64_t row = blockIdx.y; row < rows.num_rows; row += gridDim.y) {
    for (std::int64_t t = blockIdx.x; t < rows.num_keys; t += gridDim.x) {
      std::int64_t slot = -1;
      if (t < rows.context_lens[row] && t / memory.block_size < rows.table_stride) {
        const std::int64_t block = rows.block_tables[row * rows.table_stride + t / memory.block_size];
        if (block >= 0 && block < memory.num_blocks) slot = block * memory.block_size + t % memory.block_size;
      }
      for (int side = 0; side < 2; ++side) {
        const auto* source =
            slot < 0 ? nullptr : reinterpret_cast<const Piece*>(memory.data + memory.offset(slot, layer, side));
        auto* destination = reinterpret_cast<Piece*>(side == 0 ? k : v);
        for (std::int64_t i = threadIdx.x; i < pieces; i += blockDim.x) {
          const std::int64_t head = i / head_pieces, part = i % head_pieces;
          const std::int64_t place = ((row * memory.num_heads + head) * rows.num_keys + t) * head_pieces + part;
          destination[place] = source == nullptr ? Piece{} : source[i];
        }
      }
    }
  }
}

__global__ void permute_tables_kernel(TablePermutation permutation) {
  for (std::int64_t row = blockIdx.x; row < permutation.num_rows; row += gridDim.x) {
    const std::int64_t parent = permutation.parents[row];
    if (parent < 0 || parent >= permutation.num_rows) continue;
    for (std::int64_t j = threadIdx.x; j < permutation.stride; j += blockDim.x) {
      const std::int64_t from = j < permutation.prefix_blocks[row] ? parent : row;
      permutation.destination[row * permutation.stride + j] = permutation.source[from * permutation.stride + j];
    }
  }
}

unsigned grid(std::int64_t count, std::int64_t most) { return static_cast<unsigned>(count < most ? count : most); }

// Copies runs of neighbouring blocks, of which a sequence swapped as a whole mostly consists, in one piece each.
template <typename Copy>
void over_runs(const std::int32_t* blocks, std::int64_t num_blocks, Copy copy) {
  std::int64_t start = 0;
  while (start < num_blocks) {
    std::int64_t end = start + 1;
    while (end < num_blocks && blocks[end] == blocks[end - 1] + 1) ++end;
    copy(start, end - start);
    start = end;
  }
}

}  // namespace

bool built() { return true; }

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

void write(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens, Stream stream) {
  if (tokens.num_tokens == 0) return;
  const int bytes = piece({address(memory.data), memory.token_bytes(), address(tokens.k), address(tokens.v),
                           tokens.k_stride, tokens.v_stride});
  with_piece(bytes, [&](auto type) {
    write_kernel<decltype(type)>
        <<<grid(tokens.num_tokens, 1 << 20), kThreads, 0, as_cuda(stream)>>>(memory, layer, tokens);
  });
  check(cudaGetLastError(), "write");
}

void copy_blocks(const KVMemory& memory, const std::int32_t* pairs, std::int64_t num_pairs, Stream stream) {
  if (num_pairs == 0) return;
  const int bytes = piece({address(memory.data), memory.block_bytes()});
  const std::int64_t along = (memory.block_bytes() / bytes + kThreads - 1) / kThreads;
  const dim3 shape(grid(along, 1024), grid(num_pairs, kMaxGrid));
  with_piece(bytes, [&](auto type) {
    copy_blocks_kernel<decltype(type)><<<shape, kThreads, 0, as_cuda(stream)>>>(memory, pairs, num_pairs);
  });
  check(cudaGetLastError(), "copy_blocks");
}

void gather(const KVMemory& memory, std::int64_t layer, const Rows& rows, unsigned char* k, unsigned char* v,
            Stream stream) {
  if (rows.num_rows == 0 || rows.num_keys == 0) return;
  const int bytes = piece({address(memory.data), memory.head_bytes(), address(k), address(v)});
  const dim3 shape(grid(rows.num_keys, 1 << 20), grid(rows.num_rows, kMaxGrid));
  with_piece(bytes, [&](auto type) {
    gather_kernel<decltype(type)><<<shape, kThreads, 0, as_cuda(stream)>>>(memory, layer, rows, k, v);
  });
  check(cudaGetLastError(), "gather");
}

void swap_out(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, unsigned char* host,
              Stream stream) {
  over_runs(blocks, num_blocks, [&](std::int64_t start, std::int64_t count) {
    check(cudaMemcpyAsync(host + start * memory.block_bytes(), memory.data + blocks[start] * memory.block_bytes(),
                          static_cast<std::size_t>(count * memory.block_bytes()), cudaMemcpyDeviceToHost,
                          as_cuda(stream)),
          "swap_out");
  });
}

void swap_in(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, const unsigned char* host,
             Stream stream) {
  over_runs(blocks, num_blocks, [&](std::int64_t start, std::int64_t count) {
    check(cudaMemcpyAsync(memory.data + blocks[start] * memory.block_bytes(), host + start * memory.block_bytes(),
                          static_cast<std::size_t>(count * memory.block_bytes()), cudaMemcpyHostToDevice,
                          as_cuda(stream)),
          "swap_in");
  });
}

void permute_tables(const TablePermutation& permutation, Stream stream) {
  if (permutation.num_rows == 0) return;
  permute_tables_kernel<<<grid(permutation.num_rows, 1 << 20), kThreads, 0, as_cuda(stream)>>>(permutation);
  check(cudaGetLastError(), "permute_tables");
}

}  // namespace trocr_fast::cuda
