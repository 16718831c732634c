// Attention of latent queries over the encoder states in fp32 on a CPU: what kernels/latent_cross_attention.py computes
// on a GPU.
#pragma once

#include <cstdint>

namespace trocr_fast::cpu {

struct LatentCrossAttention {
  const float* q;              // [num_rows, num_heads, width], scaled; the rows of a line side by side
  std::int64_t stride_q_row;   // floats from row to row
  std::int64_t stride_q_head;  // and from head to head
  const float* states;         // [num_lines, num_keys, width], contiguous; at least one key
  float* out;                  // [num_rows, num_heads, width], contiguous
  std::int64_t num_rows;
  std::int64_t num_heads;
  std::int64_t num_lines;
  std::int64_t num_keys;
  std::int64_t width;
};

// out = softmax(q E^T) E with the states E of each row's line. `lanes` is 4, 8 or 16, at most simd::most_lanes(). Throws
// std::bad_alloc before anything is written.
//
// Sixteen queries go through the states together, block by block with a running softmax (Dao et al., arXiv 2205.14135),
// so that a block is read from memory once; a line's keys are shared among the threads, and their parts put together at
// the end. A line's rows are the same in any batch; they depend on num_threads in the last digits.
void latent_cross_attention(const LatentCrossAttention& sizes, int num_threads, int lanes);

}  // namespace trocr_fast::cpu
