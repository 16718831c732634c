// Blocks as numbers: a free list and reference counts. Knows nothing of tensors, sequences, CUDA or Python.
//
// Not thread safe: one thread at a time, like everything in this folder.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace trocr_fast {

using BlockId = std::int32_t;

// There are fewer free blocks than a call needs. The call changed nothing.
class OutOfBlocks : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class BlockAllocator {
 public:
  // Throws std::invalid_argument unless 1 <= num_blocks < 2^31.
  explicit BlockAllocator(std::int64_t num_blocks);

  // A free block, with one reference. O(1); the block freed last comes first, since its memory is likeliest in a cache.
  // Throws OutOfBlocks.
  BlockId allocate();

  // One reference more. O(1). Throws std::invalid_argument if the block is not in use.
  void retain(BlockId block);

  // One reference less; the block is free when none is left. O(1). Throws std::invalid_argument if it is not in use.
  void release(BlockId block);

  // Add free blocks, up to `num_blocks` in all; blocks in use keep their numbers.
  // Throws std::invalid_argument unless num_blocks() <= num_blocks < 2^31.
  void grow(std::int64_t num_blocks);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(references_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t num_used() const { return num_blocks() - num_free(); }

  // References to a block; 0 if it is free. Throws std::invalid_argument if there is no such block.
  std::int32_t references(BlockId block) const;

  // Throws std::logic_error unless every block is either in use or in the free list, once.
  void check_integrity() const;

 private:
  void require_used(BlockId block) const;

  std::vector<std::int32_t> references_;  // [num_blocks]
  std::vector<BlockId> free_;             // used as a stack
};

}  // namespace trocr_fast
