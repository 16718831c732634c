#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace trocr_fast::cpu {

namespace {

// Eight sums at once, in an order of their own: what the compiler may not do by itself.
float dot(const float* a, const float* b, std::int64_t size) {
  float sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (std::int64_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0;
  for (; i < size; ++i) sum += a[i] * b[i];
  for (const float part : sums) sum += part;
  return sum;
}

}  // namespace

void attend(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens, const Rows& rows, const float* q,
            std::int64_t q_stride, float* out) {
  require_rows(memory, rows);
  write(memory, layer, tokens);
  const std::int64_t dim = memory.head_dim;
  const std::int64_t width = memory.num_heads * dim;
  std::vector<float> scores;
  for (std::int64_t row = 0; row < rows.num_rows; ++row, q += q_stride, out += width) {
    const std::int64_t length = std::max<std::int64_t>(rows.context_lens[row], 0);
    const std::int32_t* table = rows.block_tables + row * rows.table_stride;
    const auto cached = [&](std::int64_t token, std::int64_t side) {
      const std::int64_t slot = table[token / memory.block_size] * memory.block_size + token % memory.block_size;
      return reinterpret_cast<const float*>(memory.data + memory.offset(slot, layer, side));
    };
    scores.resize(static_cast<std::size_t>(memory.num_heads * length));
    // Token by token: a token's heads are read in one piece.
    for (std::int64_t token = 0; token < length; ++token) {
      const float* k = cached(token, 0);
      for (std::int64_t head = 0; head < memory.num_heads; ++head) {
        scores[static_cast<std::size_t>(head * length + token)] = dot(q + head * dim, k + head * dim, dim);
      }
    }
    for (std::int64_t head = 0; head < memory.num_heads && length > 0; ++head) {
      float* const begin = scores.data() + head * length;
      float* const end = begin + length;
      const float top = *std::max_element(begin, end);
      float sum = 0;
      for (float* score = begin; score < end; ++score) sum += *score = std::exp(*score - top);
      for (float* score = begin; score < end; ++score) *score /= sum;
    }
    std::fill_n(out, width, 0.0F);
    for (std::int64_t token = 0; token < length; ++token) {
      const float* v = cached(token, 1);
      for (std::int64_t head = 0; head < memory.num_heads; ++head) {
        const float weight = scores[static_cast<std::size_t>(head * length + token)];
        for (std::int64_t i = head * dim; i < (head + 1) * dim; ++i) out[i] += weight * v[i];
      }
    }
  }
}

}  // namespace trocr_fast::cpu
