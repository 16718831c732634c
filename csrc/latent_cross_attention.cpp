#include "latent_cross_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace trocr_fast::cpu {

namespace {

constexpr std::int64_t kGroup = 16;   // queries that go together, one a lane
constexpr std::int64_t kBlock = 96;   // keys: with the group's queries they stay in the second-level cache
constexpr std::int64_t kDepth = 192;  // of a score's products in one sum: rounding grows with a sum's length
constexpr std::int64_t kLeast = 64;   // keys a thread has at least

// What one group has found in one part of its keys, in size(width) floats from `begin` on.
struct Part {
  explicit Part(float* begin) : tops(begin), sums(begin + kGroup), mixed(begin + 2 * kGroup) {}
  static std::int64_t size(std::int64_t width) { return kGroup * (2 + width); }

  float* tops;   // [kGroup], the greatest score
  float* sums;   // [kGroup], of exp(score - top)
  float* mixed;  // [kGroup, width], of exp(score - top) times the states
};

// Scores [num_keys, kGroup] of a block -> exp of them less the running top; `tops` and `sums` go on, and `fades` is by
// how much everything before has to shrink.
template <int kLanes>
TROCR_FAST_INLINE void exponentiate(float* scores, std::int64_t num_keys, float* tops, float* sums, float* fades) {
  using simd::Floats;
  for (std::int64_t i = 0; i < kGroup; i += kLanes) {
    const Floats<kLanes> before = simd::load<kLanes>(tops + i);
    Floats<kLanes> top = before;
    for (std::int64_t k = 0; k < num_keys; ++k) {
      top = simd::greatest<kLanes>(simd::load<kLanes>(scores + k * kGroup + i), top);
    }
    const Floats<kLanes> fade = simd::exp<kLanes>(before - top);
    Floats<kLanes> sum = simd::load<kLanes>(sums + i) * fade;
    for (std::int64_t k = 0; k < num_keys; ++k) {
      float* const at = scores + k * kGroup + i;
      const Floats<kLanes> x = simd::exp<kLanes>(simd::load<kLanes>(at) - top);
      simd::store<kLanes>(at, x);
      sum += x;
    }
    simd::store<kLanes>(tops + i, top);
    simd::store<kLanes>(sums + i, sum);
    simd::store<kLanes>(fades + i, fade);
  }
}

// queries [width, kGroup] over states [num_keys, width].
template <int kLanes, int kKeys, int kQueries>
TROCR_FAST_INLINE void attend_part(const float* queries, const float* states, std::int64_t num_keys,
                                   std::int64_t width, const Part& part, float* scores) {
  constexpr int kVectors = kGroup / kLanes;
  const std::int64_t whole = width / (2 * kLanes) * (2 * kLanes);
  float fades[kGroup];
  std::fill_n(part.tops, kGroup, std::numeric_limits<float>::lowest());  // with -inf, scores of -inf would be NaN
  std::fill_n(part.sums, kGroup, 0.0F);
  std::fill_n(part.mixed, kGroup * width, 0.0F);
  for (std::int64_t first = 0; first < num_keys; first += kBlock, states += kBlock * width) {
    const std::int64_t there = std::min(kBlock, num_keys - first);
    for (std::int64_t d = 0; d < width; d += kDepth) {
      const std::int64_t depth = std::min(kDepth, width - d);
      const float* const from = states + d;
      const float* const to_queries = queries + d * kGroup;
      std::int64_t k = 0;
      for (; k + kKeys <= there; k += kKeys) {
        simd::multiply<kLanes, kVectors, kKeys>({from + k * width, width, 1}, to_queries, kGroup, depth,
                                                scores + k * kGroup, kGroup, d > 0);
      }
      for (; k < there; ++k) {
        simd::multiply<kLanes, kVectors, 1>({from + k * width, width, 1}, to_queries, kGroup, depth,
                                            scores + k * kGroup, kGroup, d > 0);
      }
    }
    exponentiate<kLanes>(scores, there, part.tops, part.sums, fades);
    if (first > 0) {
      for (std::int64_t i = 0; i < kGroup; ++i) {
        for (std::int64_t d = 0; d < width; ++d) part.mixed[i * width + d] *= fades[i];
      }
    }
    for (std::int64_t d = 0; d < whole; d += 2 * kLanes) {
      for (std::int64_t i = 0; i < kGroup; i += kQueries) {
        simd::multiply<kLanes, 2, kQueries>({scores + i, 1, kGroup}, states + d, width, there,
                                            part.mixed + i * width + d, width, true);
      }
    }
    for (std::int64_t d = whole; d < width; ++d) {
      for (std::int64_t k = 0; k < there; ++k) {
        for (std::int64_t i = 0; i < kGroup; ++i) {
          part.mixed[i * width + d] += scores[k * kGroup + i] * states[k * width + d];
        }
      }
    }
  }
}

using AttendPart = void (*)(const float*, const float*, std::int64_t, std::int64_t, const Part&, float*);

TROCR_FAST_TARGET("avx512f,fma")
void attend_part_16(const float* queries, const float* states, std::int64_t num_keys, std::int64_t width,
                    const Part& part, float* scores) {
  attend_part<16, 12, 8>(queries, states, num_keys, width, part, scores);
}

TROCR_FAST_TARGET("avx2,fma")
void attend_part_8(const float* queries, const float* states, std::int64_t num_keys, std::int64_t width,
                   const Part& part, float* scores) {
  attend_part<8, 6, 4>(queries, states, num_keys, width, part, scores);
}

void attend_part_4(const float* queries, const float* states, std::int64_t num_keys, std::int64_t width,
                   const Part& part, float* scores) {
  attend_part<4, 2, 4>(queries, states, num_keys, width, part, scores);
}

}  // namespace

void latent_cross_attention(const LatentCrossAttention& sizes, int num_threads, int lanes) {
  if (sizes.num_lines == 0 || sizes.width == 0) return;
  const AttendPart attend = lanes == 16 ? attend_part_16 : lanes == 8 ? attend_part_8 : attend_part_4;
  const std::int64_t width = sizes.width, keys = sizes.num_keys;
  const std::int64_t queries = sizes.num_rows / sizes.num_lines * sizes.num_heads;  // of a line
  const std::int64_t line_groups = (queries + kGroup - 1) / kGroup;
  const std::int64_t groups = sizes.num_lines * line_groups;
  const std::int64_t parts = std::clamp<std::int64_t>(keys / kLeast, 1, num_threads);

  // Query `i` of a group, as (row, head); false beyond the line's last.
  const auto find = [&](std::int64_t group, std::int64_t i, std::int64_t& row, std::int64_t& head) {
    const std::int64_t query = group % line_groups * kGroup + i;
    row = (group / line_groups * queries + query) / sizes.num_heads;
    head = query % sizes.num_heads;
    return query < queries;
  };

  const Buffers packed(groups, kGroup * width);  // [width, kGroup] of each group
  parallel_for(groups, num_threads, [&](std::int64_t group, int) {
    float* const to = packed[group];
    for (std::int64_t i = 0; i < kGroup; ++i) {
      std::int64_t row, head;
      const bool is_there = find(group, i, row, head);
      const float* const from = sizes.q + row * sizes.stride_q_row + head * sizes.stride_q_head;
      for (std::int64_t d = 0; d < width; ++d) to[d * kGroup + i] = is_there ? from[d] : 0.0F;
    }
  });

  const Buffers found(groups * parts, Part::size(width));
  const Buffers scores(num_threads, kBlock * kGroup);
  parallel_for(groups * parts, num_threads, [&](std::int64_t index, int thread) {
    const std::int64_t group = index / parts, part = index % parts;
    const std::int64_t first = keys * part / parts, end = keys * (part + 1) / parts;
    attend(packed[group], sizes.states + (group / line_groups * keys + first) * width, end - first, width,
           Part(found[index]), scores[thread]);
  });

  parallel_for(groups, num_threads, [&](std::int64_t group, int) {
    std::int64_t row, head;
    for (std::int64_t i = 0; i < kGroup && find(group, i, row, head); ++i) {
      float* const to = sizes.out + (row * sizes.num_heads + head) * width;
      float top = std::numeric_limits<float>::lowest();
      for (std::int64_t p = 0; p < parts; ++p) top = std::max(top, Part(found[group * parts + p]).tops[i]);
      float sum = 0;
      for (std::int64_t p = 0; p < parts; ++p) {
        const Part part(found[group * parts + p]);
        const float weight = std::exp(part.tops[i] - top);
        const float* const mixed = part.mixed + i * width;
        sum += weight * part.sums[i];
        for (std::int64_t d = 0; d < width; ++d) to[d] = (p == 0 ? 0.0F : to[d]) + weight * mixed[d];
      }
      for (std::int64_t d = 0; d < width; ++d) to[d] /= sum;
    }
  });
}

}  // namespace trocr_fast::cpu
