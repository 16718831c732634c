// Self-attention of the encoder in fp32 on a CPU: what kernels/encoder_attention.py computes on a GPU.
#pragma once

#include <cstdint>

namespace trocr_fast::cpu {

struct EncoderAttention {
  const float* qkv;  // [num_pictures, num_tokens, 3, num_heads, head_dim], contiguous
  float* out;        // [num_pictures, num_tokens, num_heads, head_dim], contiguous
  std::int64_t num_pictures;
  std::int64_t num_tokens;
  std::int64_t num_heads;
  std::int64_t head_dim;
};

// out = softmax(Q K^T / sqrt(head_dim)) V of each picture and head; a picture's rows are the same in any batch and with
// any number of threads. `lanes` is 4, 8 or 16, at most simd::most_lanes(). Throws std::bad_alloc before anything is
// written.
//
// Keys and values of a head are packed once, in panels of two vectors; then a few queries at a time go over all of
// them, with their scores in the first-level cache.
void encoder_attention(const EncoderAttention& sizes, int num_threads, int lanes);

}  // namespace trocr_fast::cpu
