#include "encoder_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace trocr_fast::cpu {

namespace {

constexpr std::int64_t kMostLanes = 16;
constexpr std::int64_t kMostQueries = 12;  // at a time

constexpr std::int64_t up_to_multiple(std::int64_t size, std::int64_t of) { return (size + of - 1) / of * of; }

// Floats that attend_head needs.
std::int64_t scratch_size(const EncoderAttention& sizes) {
  const std::int64_t tokens = up_to_multiple(sizes.num_tokens, 2 * kMostLanes);
  const std::int64_t dims = up_to_multiple(sizes.head_dim, 2 * kMostLanes);
  return dims * (2 * tokens + 2 * kMostQueries) + kMostQueries * tokens;
}

// scores [kQueries, stride] -> exp of the first `tokens` of each row less their greatest, and 1 / their sum. What fills up
// the last vector counts in it as exp(-87), which is nothing beside 1.
template <int kLanes, int kQueries>
TROCR_FAST_INLINE void exponentiate(float* scores, std::int64_t stride, std::int64_t tokens, float* inverse_sums) {
  using simd::Floats;
  const std::int64_t end = up_to_multiple(tokens, kLanes);
  for (int i = 0; i < kQueries; ++i, scores += stride) {
    std::fill(scores + tokens, scores + end, -std::numeric_limits<float>::infinity());
    Floats<kLanes> tops = simd::load<kLanes>(scores);
    for (std::int64_t t = kLanes; t < end; t += kLanes) {
      tops = simd::greatest<kLanes>(simd::load<kLanes>(scores + t), tops);
    }
    float top = tops[0];
    for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
    Floats<kLanes> sums = {};
    for (std::int64_t t = 0; t < end; t += kLanes) {
      const Floats<kLanes> x = simd::exp<kLanes>(simd::load<kLanes>(scores + t) - top);
      simd::store<kLanes>(scores + t, x);
      sums += x;
    }
    inverse_sums[i] = 1 / simd::sum<kLanes>(sums);
  }
}

// One head of one picture; `qkv` and `out` begin at its first value.
template <int kLanes, int kQueries>
TROCR_FAST_INLINE void attend_head(const EncoderAttention& sizes, const float* qkv, float* out, float* scratch) {
  constexpr std::int64_t kPanel = 2 * kLanes;
  const std::int64_t tokens = sizes.num_tokens, dim = sizes.head_dim;
  const std::int64_t width = sizes.num_heads * dim;
  const std::int64_t stride = 3 * width;  // from token to token
  const std::int64_t padded = up_to_multiple(tokens, kPanel), padded_dim = up_to_multiple(dim, kPanel);
  float* const keys = scratch;                             // [padded / kPanel, dim, kPanel]
  float* const values = keys + padded * padded_dim;        // [padded_dim / kPanel, tokens, kPanel]
  float* const queries = values + padded * padded_dim;     // [kQueries, dim]
  float* const mixed = queries + kQueries * padded_dim;    // [kQueries, padded_dim]
  float* const scores = mixed + kQueries * padded_dim;     // [kQueries, padded]

  for (std::int64_t panel = 0; panel < padded; panel += kPanel) {
    for (std::int64_t i = 0; i < kPanel; ++i) {
      const bool is_there = panel + i < tokens;
      const float* const k = qkv + (panel + i) * stride + width;
      for (std::int64_t d = 0; d < dim; ++d) keys[panel * dim + d * kPanel + i] = is_there ? k[d] : 0.0F;
    }
  }
  for (std::int64_t panel = 0; panel < padded_dim; panel += kPanel) {
    const std::int64_t there = std::min(kPanel, dim - panel);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* const v = qkv + t * stride + 2 * width + panel;
      float* const packed = values + panel * tokens + t * kPanel;
      std::copy_n(v, there, packed);
      std::fill(packed + there, packed + kPanel, 0.0F);
    }
  }

  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  for (std::int64_t first = 0; first < tokens; first += kQueries) {
    const std::int64_t there = std::min<std::int64_t>(kQueries, tokens - first);
    for (std::int64_t i = 0; i < there; ++i) {
      const float* const q = qkv + (first + i) * stride;
      for (std::int64_t d = 0; d < dim; ++d) queries[i * dim + d] = q[d] * scale;
    }
    std::fill(queries + there * dim, queries + kQueries * dim, 0.0F);
    std::int64_t panel = 0;
    for (; panel + kLanes < tokens; panel += kPanel) {
      simd::multiply<kLanes, 2, kQueries>({queries, dim, 1}, keys + panel * dim, kPanel, dim, scores + panel, padded,
                                          false);
    }
    if (panel < tokens) {  // half a panel
      simd::multiply<kLanes, 1, kQueries>({queries, dim, 1}, keys + panel * dim, kPanel, dim, scores + panel, padded,
                                          false);
    }
    float inverse_sums[kQueries];
    exponentiate<kLanes, kQueries>(scores, padded, tokens, inverse_sums);
    for (panel = 0; panel < padded_dim; panel += kPanel) {
      simd::multiply<kLanes, 2, kQueries>({scores, padded, 1}, values + panel * tokens, kPanel, tokens, mixed + panel,
                                          padded_dim, false);
    }
    for (std::int64_t i = 0; i < there; ++i) {
      float* const to = out + (first + i) * width;
      for (std::int64_t d = 0; d < dim; ++d) to[d] = mixed[i * padded_dim + d] * inverse_sums[i];
    }
  }
}

using AttendHead = void (*)(const EncoderAttention&, const float*, float*, float*);

TROCR_FAST_TARGET("avx512f,fma")
void attend_head_16(const EncoderAttention& sizes, const float* qkv, float* out, float* scratch) {
  attend_head<16, kMostQueries>(sizes, qkv, out, scratch);
}

TROCR_FAST_TARGET("avx2,fma")
void attend_head_8(const EncoderAttention& sizes, const float* qkv, float* out, float* scratch) {
  attend_head<8, 6>(sizes, qkv, out, scratch);
}

void attend_head_4(const EncoderAttention& sizes, const float* qkv, float* out, float* scratch) {
  attend_head<4, 6>(sizes, qkv, out, scratch);
}

}  // namespace

void encoder_attention(const EncoderAttention& sizes, int num_threads, int lanes) {
  const AttendHead attend = lanes == 16 ? attend_head_16 : lanes == 8 ? attend_head_8 : attend_head_4;
  const Buffers scratch(num_threads, scratch_size(sizes));
  parallel_for(sizes.num_pictures * sizes.num_heads, num_threads, [&](std::int64_t index, int thread) {
    const std::int64_t picture = index / sizes.num_heads, head = index % sizes.num_heads;
    const std::int64_t begin = picture * sizes.num_tokens * sizes.num_heads;  // heads, in `out`
    attend(sizes, sizes.qkv + (3 * begin + head) * sizes.head_dim, sizes.out + (begin + head) * sizes.head_dim,
           scratch[thread]);
  });
}

}  // namespace trocr_fast::cpu
