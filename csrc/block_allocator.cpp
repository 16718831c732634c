#include "block_allocator.h"

#include <limits>
#include <string>

namespace trocr_fast {

BlockAllocator::BlockAllocator(std::int64_t num_blocks) {
  if (num_blocks < 1) {
    throw std::invalid_argument("num_blocks: expected at least 1, got " + std::to_string(num_blocks));
  }
  grow(num_blocks);
}

void BlockAllocator::grow(std::int64_t num_blocks) {
  const std::int64_t old = this->num_blocks();
  if (num_blocks < old || num_blocks > std::numeric_limits<BlockId>::max()) {
    throw std::invalid_argument("num_blocks: expected " + std::to_string(old) + " to " +
                                std::to_string(std::numeric_limits<BlockId>::max()) + ", got " +
                                std::to_string(num_blocks));
  }
  const auto added = static_cast<std::size_t>(num_blocks - old);
  std::vector<BlockId> fresh(added);
  free_.reserve(static_cast<std::size_t>(num_blocks));  // so that release() never allocates
  references_.resize(static_cast<std::size_t>(num_blocks), 0);  // the last that can fail
  // Under what is free already, and highest first: low numbers are handed out first, so little memory is touched.
  for (std::size_t i = 0; i < added; ++i) fresh[i] = static_cast<BlockId>(num_blocks - 1 - static_cast<std::int64_t>(i));
  free_.insert(free_.begin(), fresh.begin(), fresh.end());
}

BlockId BlockAllocator::allocate() {
  if (free_.empty()) {
    throw OutOfBlocks("expected a free block, 0 of " + std::to_string(num_blocks()) + " are free");
  }
  const BlockId block = free_.back();
  free_.pop_back();
  references_[static_cast<std::size_t>(block)] = 1;
  return block;
}

void BlockAllocator::retain(BlockId block) {
  require_used(block);
  ++references_[static_cast<std::size_t>(block)];
}

void BlockAllocator::release(BlockId block) {
  require_used(block);
  if (--references_[static_cast<std::size_t>(block)] == 0) free_.push_back(block);
}

std::int32_t BlockAllocator::references(BlockId block) const {
  if (block < 0 || block >= num_blocks()) {
    throw std::invalid_argument("block: expected 0 to " + std::to_string(num_blocks() - 1) + ", got " +
                                std::to_string(block));
  }
  return references_[static_cast<std::size_t>(block)];
}

void BlockAllocator::require_used(BlockId block) const {
  if (references(block) == 0) {
    throw std::invalid_argument("block " + std::to_string(block) + ": expected a block in use, it is free");
  }
}

void BlockAllocator::check_integrity() const {
  std::vector<bool> listed(references_.size(), false);
  for (const BlockId block : free_) {
    if (references(block) != 0) throw std::logic_error("block " + std::to_string(block) + " is free and in use");
    if (listed[static_cast<std::size_t>(block)]) {
      throw std::logic_error("block " + std::to_string(block) + " is twice in the free list");
    }
    listed[static_cast<std::size_t>(block)] = true;
  }
  for (std::size_t block = 0; block < references_.size(); ++block) {
    if (references_[block] < 0 || (references_[block] == 0 && !listed[block])) {
      throw std::logic_error("block " + std::to_string(block) + " is neither in use nor in the free list");
    }
  }
}

}  // namespace trocr_fast
