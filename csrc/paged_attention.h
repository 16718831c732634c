// Attention of a decode step over cached keys and values, in fp32 on a CPU: what kernels/paged_attention.py computes on
// a GPU, in one pass over memory and one call a layer.
#pragma once

#include <cstdint>

#include "kv_memory.h"

namespace trocr_fast::cpu {

// Stores the new tokens of `layer` as `write` does; then, for each row and head over the row's tokens, the new one among
// them, out = softmax(q . K) V, and zeros for a row of no tokens.
//
//   q    [num_rows, num_heads, head_dim], scaled; q_stride values from row to row
//   out  [num_rows, num_heads, head_dim], contiguous
//
// `memory` holds fp32. Throws as require_rows and `write` do, before anything is written.
void attend(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens, const Rows& rows, const float* q,
            std::int64_t q_stride, float* out);

}  // namespace trocr_fast::cpu
