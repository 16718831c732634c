// The bytes behind the blocks: writing keys and values, copying blocks, gathering rows, moving blocks to host memory
// and back. Every operation on them exists twice, in kv_memory_cpu.cpp and kv_memory_cuda.cu, and leaves the same bytes.
// Values are only moved, so that fp32, fp16 and bf16 differ by their size alone.
//
// Pointers and sizes are trusted here; bindings.cpp has checked them. CUDA operations are enqueued on `stream` and
// return; nothing here allocates or synchronises.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TROCR_FAST_BOTH __host__ __device__
#else
#define TROCR_FAST_BOTH
#endif

namespace trocr_fast {

// [num_blocks, num_layers, 2, block_size, num_heads, head_dim], contiguous, keys before values. Blocks come first, so
// that copying or swapping a block moves one piece of memory; a token's heads are side by side, so that attention reads
// num_heads * head_dim values of a token in one piece.
struct KVMemory {
  unsigned char* data;
  std::int64_t num_blocks;
  std::int64_t num_layers;
  std::int64_t block_size;
  std::int64_t num_heads;
  std::int64_t head_dim;
  std::int64_t item_size;  // bytes of a value: 2 or 4

  TROCR_FAST_BOTH std::int64_t head_bytes() const { return head_dim * item_size; }
  TROCR_FAST_BOTH std::int64_t token_bytes() const { return num_heads * head_bytes(); }  // of one token's K (or V) in one layer
  TROCR_FAST_BOTH std::int64_t side_bytes() const { return block_size * token_bytes(); }  // of a block's K (or V) in one layer
  TROCR_FAST_BOTH std::int64_t block_bytes() const { return num_layers * 2 * side_bytes(); }
  TROCR_FAST_BOTH std::int64_t num_slots() const { return num_blocks * block_size; }

  // Where a slot's K (side 0) or V (side 1) of a layer begins, in bytes.
  TROCR_FAST_BOTH std::int64_t offset(std::int64_t slot, std::int64_t layer, std::int64_t side) const {
    return slot / block_size * block_bytes() + (layer * 2 + side) * side_bytes() + slot % block_size * token_bytes();
  }
};

// Keys and values of new tokens, [num_tokens, num_heads, head_dim] each; only the first stride is free.
struct NewTokens {
  const unsigned char* k;
  const unsigned char* v;
  std::int64_t k_stride;  // bytes from token to token
  std::int64_t v_stride;
  const std::int64_t* slot_mapping;  // [num_tokens]; -1 writes nothing
  std::int64_t num_tokens;
};

// Rows to gather. Block tables are read up to the row's number of tokens only.
struct Rows {
  const std::int32_t* block_tables;  // [num_rows, table_stride]
  std::int64_t table_stride;
  const std::int32_t* context_lens;  // [num_rows], tokens a row
  std::int64_t num_rows;
  std::int64_t num_keys;  // longer rows are cut
};

// Rows of block tables put in a new order.
struct TablePermutation {
  const std::int32_t* source;  // [num_rows, stride]
  std::int32_t* destination;   // [num_rows, stride], another memory
  std::int64_t num_rows;
  std::int64_t stride;
  const std::int64_t* parents;        // [num_rows]
  const std::int32_t* prefix_blocks;  // [num_rows]
};

namespace cpu {

// Throws std::invalid_argument for a row that is longer than its table, or a number in it that is no block.
void require_rows(const KVMemory& memory, const Rows& rows);

// Row t of `tokens` goes to slot slot_mapping[t] of `layer`. Throws std::invalid_argument for a slot that is neither
// -1 nor in the memory, before anything is written.
void write(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens);

// For each pair (source, destination) of `pairs` [num_pairs, 2] the whole of block `source` to block `destination`.
// No block may be both. Throws std::invalid_argument for a number that is no block, before anything is copied.
void copy_blocks(const KVMemory& memory, const std::int32_t* pairs, std::int64_t num_pairs);

// Keys and values of one layer to `k` and `v` [num_rows, num_heads, num_keys, head_dim]; zeros after a row's end.
// Throws as require_rows, before anything is written.
void gather(const KVMemory& memory, std::int64_t layer, const Rows& rows, unsigned char* k, unsigned char* v);

// Whole blocks to `host` [num_blocks of the list, block_bytes], or from there. `blocks` were checked.
void swap_out(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, unsigned char* host);
void swap_in(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, const unsigned char* host);

// destination[i][j] = source[parents[i]][j] for j < prefix_blocks[i], else source[i][j].
// Throws std::invalid_argument for a parent that is no row, before anything is written.
void permute_tables(const TablePermutation& permutation);

}  // namespace cpu

// The same on a CUDA device: indices are device memory and not checked, but one that lies outside writes nothing
// (write, copy_blocks, permute_tables) or gives zeros (gather). `host` of swap_out and swap_in is pinned memory.
// Throws std::runtime_error with CUDA's words if a launch fails. In a build without CUDA (kv_memory_no_cuda.cpp)
// everything but built() throws std::logic_error.
namespace cuda {

using Stream = void*;  // cudaStream_t

bool built();

// Makes `device` the current one for its life.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

void write(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens, Stream stream);
void copy_blocks(const KVMemory& memory, const std::int32_t* pairs, std::int64_t num_pairs, Stream stream);
void gather(const KVMemory& memory, std::int64_t layer, const Rows& rows, unsigned char* k, unsigned char* v,
            Stream stream);
void swap_out(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, unsigned char* host,
              Stream stream);
void swap_in(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, const unsigned char* host,
             Stream stream);
void permute_tables(const TablePermutation& permutation, Stream stream);

}  // namespace cuda

}  // namespace trocr_fast
