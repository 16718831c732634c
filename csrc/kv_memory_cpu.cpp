#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kv_memory.h"

namespace trocr_fast::cpu {

namespace {

std::size_t size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

void require_block(const KVMemory& memory, std::int64_t block) {
  if (block < 0 || block >= memory.num_blocks) {
    throw std::invalid_argument("block: expected 0 to " + std::to_string(memory.num_blocks - 1) + ", got " +
                                std::to_string(block));
  }
}

}  // namespace

void require_rows(const KVMemory& memory, const Rows& rows) {
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const std::int64_t length = std::min<std::int64_t>(rows.context_lens[row], rows.num_keys);
    for (std::int64_t t = 0; t < length; t += memory.block_size) {
      if (t / memory.block_size >= rows.table_stride) {
        throw std::invalid_argument("context_lens: expected at most " +
                                    std::to_string(rows.table_stride * memory.block_size) + ", got " +
                                    std::to_string(rows.context_lens[row]));
      }
      require_block(memory, rows.block_tables[row * rows.table_stride + t / memory.block_size]);
    }
  }
}

void write(const KVMemory& memory, std::int64_t layer, const NewTokens& tokens) {
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    const std::int64_t slot = tokens.slot_mapping[t];
    if (slot < -1 || slot >= memory.num_slots()) {
      throw std::invalid_argument("slot_mapping: expected -1 to " + std::to_string(memory.num_slots() - 1) + ", got " +
                                  std::to_string(slot));
    }
  }
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    const std::int64_t slot = tokens.slot_mapping[t];
    if (slot == -1) continue;
    std::memcpy(memory.data + memory.offset(slot, layer, 0), tokens.k + t * tokens.k_stride,
                size(memory.token_bytes()));
    std::memcpy(memory.data + memory.offset(slot, layer, 1), tokens.v + t * tokens.v_stride,
                size(memory.token_bytes()));
  }
}

void copy_blocks(const KVMemory& memory, const std::int32_t* pairs, std::int64_t num_pairs) {
  for (std::int64_t i = 0; i < 2 * num_pairs; ++i) require_block(memory, pairs[i]);
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    std::memmove(memory.data + pairs[2 * i + 1] * memory.block_bytes(),
                 memory.data + pairs[2 * i] * memory.block_bytes(), size(memory.block_bytes()));
  }
}

void gather(const KVMemory& memory, std::int64_t layer, const Rows& rows, unsigned char* k, unsigned char* v) {
  const auto tokens = [&](std::int64_t row) {
    const std::int64_t length = rows.context_lens[row];
    return length < rows.num_keys ? length : rows.num_keys;
  };
  require_rows(memory, rows);
  if (rows.num_keys == 0) return;  // k and v may be null then
  const std::int64_t head = memory.head_bytes();
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const std::int32_t* table = rows.block_tables + row * rows.table_stride;
    // Token by token: a token's heads are read in one piece, and a block is found once.
    for (std::int64_t t = 0; t < tokens(row); ++t) {
      const std::int64_t slot = table[t / memory.block_size] * memory.block_size + t % memory.block_size;
      const unsigned char* from_k = memory.data + memory.offset(slot, layer, 0);
      const unsigned char* from_v = memory.data + memory.offset(slot, layer, 1);
      for (std::int64_t h = 0; h < memory.num_heads; ++h) {
        const std::int64_t place = ((row * memory.num_heads + h) * rows.num_keys + t) * head;
        std::memcpy(k + place, from_k + h * head, size(head));
        std::memcpy(v + place, from_v + h * head, size(head));
      }
    }
    const std::int64_t end = tokens(row) < 0 ? 0 : tokens(row);
    for (std::int64_t h = 0; h < memory.num_heads; ++h) {
      const std::int64_t place = ((row * memory.num_heads + h) * rows.num_keys + end) * head;
      std::memset(k + place, 0, size((rows.num_keys - end) * head));
      std::memset(v + place, 0, size((rows.num_keys - end) * head));
    }
  }
}

void swap_out(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, unsigned char* host) {
  for (std::int64_t i = 0; i < num_blocks; ++i) {
    std::memcpy(host + i * memory.block_bytes(), memory.data + blocks[i] * memory.block_bytes(),
                size(memory.block_bytes()));
  }
}

void swap_in(const KVMemory& memory, const std::int32_t* blocks, std::int64_t num_blocks, const unsigned char* host) {
  for (std::int64_t i = 0; i < num_blocks; ++i) {
    std::memcpy(memory.data + blocks[i] * memory.block_bytes(), host + i * memory.block_bytes(),
                size(memory.block_bytes()));
  }
}

void permute_tables(const TablePermutation& permutation) {
  for (std::int64_t row = 0; row < permutation.num_rows; ++row) {
    if (permutation.parents[row] < 0 || permutation.parents[row] >= permutation.num_rows) {
      throw std::invalid_argument("parents: expected 0 to " + std::to_string(permutation.num_rows - 1) + ", got " +
                                  std::to_string(permutation.parents[row]));
    }
  }
  for (std::int64_t row = 0; row < permutation.num_rows; ++row) {
    const std::int32_t* own = permutation.source + row * permutation.stride;
    const std::int32_t* parent = permutation.source + permutation.parents[row] * permutation.stride;
    std::int32_t* out = permutation.destination + row * permutation.stride;
    for (std::int64_t j = 0; j < permutation.stride; ++j) {
      out[j] = j < permutation.prefix_blocks[row] ? parent[j] : own[j];
    }
  }
}

}  // namespace trocr_fast::cpu
