// Who owns which block: sequences, their block tables, sharing and copy-on-write.
//
// A sequence of `length` tokens holds ceil(length / block_size) blocks; token t lies in slot
// `table[t / block_size] * block_size + t % block_size`. Blocks are shared between forked sequences; a block that is
// shared and not full is copied before one of its sequences writes to it. This class decides and remembers; the bytes
// are moved by kv_memory.h, in the order: block copies first, then writes.
//
// Every call checks all of its arguments and the number of free blocks first and changes nothing if it throws one of
// these (after std::bad_alloc, which only the host's own memory can cause, the cache is not to be used any more):
//   OutOfBlocks            fewer free blocks than needed
//   std::invalid_argument  anything wrong with an argument, an unknown or released sequence among them
// Not thread safe: one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "block_allocator.h"

namespace trocr_fast {

// A slot of the sequence table in the low 32 bits, above them how often the slot was used before (modulo 2^31): a
// released id is known for what it is.
using SequenceId = std::int64_t;

// A run of values that someone else owns (std::span is C++20).
template <typename T>
struct Span {
  T* data;
  std::size_t size;
  T& operator[](std::size_t i) const { return data[i]; }
  T* begin() const { return data; }
  T* end() const { return data + size; }
};

// The whole of block `source` has to be copied to block `destination`.
struct BlockCopy {
  BlockId source;
  BlockId destination;
};

// Sequences that were taken out of the cache: their tables, by places in a list of distinct blocks.
struct Detached {
  std::int64_t block_size = 0;
  std::int64_t num_blocks = 0;  // distinct ones
  std::vector<std::int64_t> lengths;
  std::vector<std::vector<BlockId>> tables;  // places 0 to num_blocks - 1
};

class PagedCache {
 public:
  // block_size: tokens a block, a power of two from 1 to 64. max_blocks: a sequence may hold so many.
  PagedCache(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_blocks);

  // A new sequence without tokens.
  SequenceId add();

  // A new sequence with the tokens of `parent`, sharing all of its blocks.
  SequenceId fork(SequenceId parent);

  // Room for num_tokens[i] more tokens of sequences[i], all or none of them. Writes the slot of every new token to
  // slot_mapping (sum of num_tokens entries, sequence by sequence). Returns the block copies to do before writing.
  std::vector<BlockCopy> reserve(Span<const SequenceId> sequences, Span<const std::int64_t> num_tokens,
                                 Span<std::int64_t> slot_mapping);

  // A beam step: sequences[i] goes on from what sequences[parents[i]] holds. Blocks are shared, none is copied or
  // allocated. With tail > 0 each sequence keeps its own last `tail` tokens, which were reserved before the parents
  // were known, and takes only what is before them from its parent; that border has to be a border between blocks, and
  // nobody else may hold the blocks after it.
  void permute(Span<const SequenceId> sequences, Span<const std::int64_t> parents, std::int64_t tail);

  // Forget sequences; blocks that nobody else holds become free.
  void release(Span<const SequenceId> sequences);

  // Take sequences out, to be brought back later by attach(). `blocks` gets the distinct blocks they hold, in the order
  // of Detached; their bytes have to be saved before anything else is written, for the blocks are released here.
  Detached detach(Span<const SequenceId> sequences, std::vector<BlockId>& blocks);

  // Bring detached sequences back under new ids, in their order. Returns the new blocks in the order of Detached, into
  // which the saved bytes have to be written.
  std::vector<BlockId> attach(const Detached& detached, std::vector<SequenceId>& sequences);

  // More blocks; see BlockAllocator::grow.
  void grow(std::int64_t num_blocks) { allocator_.grow(num_blocks); }

  // Write the block table of sequences[i] to row i of `tables`, `stride` entries a row; what is after it stays as it is.
  // `stride` must be at least the longest table. Writes the number of tokens to lengths[i].
  void fill_tables(Span<const SequenceId> sequences, std::int32_t* tables, std::int64_t stride,
                   std::int32_t* lengths) const;

  const std::vector<BlockId>& table(SequenceId sequence) const { return get(sequence).table; }
  std::int64_t length(SequenceId sequence) const { return get(sequence).length; }
  std::int64_t block_size() const { return block_size_; }
  std::int64_t max_blocks() const { return max_blocks_; }
  std::int64_t num_sequences() const { return num_sequences_; }
  const BlockAllocator& allocator() const { return allocator_; }

  // Share of the slots of used blocks that hold a token, 0 to 1; 1 if no block is used. Linear in all tables.
  double utilisation() const;

  // Throws std::logic_error unless each block has as many references as tables hold it, no table holds a block twice
  // and every table is as long as its sequence needs. Linear in all tables.
  void check_integrity() const;

 private:
  struct Sequence {
    bool live = false;
    std::int64_t generation = 0;
    std::int64_t length = 0;
    std::vector<BlockId> table;
  };

  // What a beam step does to one table: from place `first` on it becomes `table`.
  struct Change {
    std::ptrdiff_t first = 0;
    std::int64_t length = 0;
    std::vector<BlockId> table;
  };

  const Sequence& get(SequenceId sequence) const;
  Sequence& get(SequenceId sequence);
  std::int64_t blocks_of(std::int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }
  void require_distinct(Span<const SequenceId> sequences);
  SequenceId new_sequence();
  void drop(SequenceId sequence);

  BlockAllocator allocator_;
  std::int64_t block_size_;
  std::int64_t max_blocks_;
  std::vector<Sequence> sequences_;
  std::vector<std::size_t> free_sequences_;  // slots of sequences_ without a live one
  std::int64_t num_sequences_ = 0;

  // Scratch, kept so that a step allocates nothing. A mark counts as set when it equals the call's number.
  std::int64_t call_ = 0;
  std::vector<std::int64_t> sequence_marks_;
  std::vector<std::int64_t> block_marks_;
  std::vector<std::int32_t> block_counts_;
  std::vector<Change> changes_;
};

}  // namespace trocr_fast
