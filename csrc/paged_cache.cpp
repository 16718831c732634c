#include "paged_cache.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace trocr_fast {

namespace {

constexpr std::int64_t kMaxBlockSize = 64;

std::string text(std::int64_t value) { return std::to_string(value); }

void require_size(const char* name, std::size_t expected, std::size_t got) {
  if (expected != got) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " entries, got " +
                                std::to_string(got));
  }
}

}  // namespace

PagedCache::PagedCache(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_blocks)
    : allocator_(num_blocks), block_size_(block_size), max_blocks_(max_blocks) {
  if (block_size < 1 || block_size > kMaxBlockSize || (block_size & (block_size - 1)) != 0) {
    throw std::invalid_argument("block_size: expected a power of two from 1 to 64, got " + text(block_size));
  }
  if (max_blocks < 1 || max_blocks > std::numeric_limits<BlockId>::max() / block_size) {
    throw std::invalid_argument("max_blocks: expected 1 to " +
                                text(std::numeric_limits<BlockId>::max() / block_size) + ", got " + text(max_blocks));
  }
}

const PagedCache::Sequence& PagedCache::get(SequenceId sequence) const {
  const auto slot = static_cast<std::size_t>(sequence & 0xffffffff);
  if (sequence < 0 || slot >= sequences_.size() || !sequences_[slot].live ||
      sequences_[slot].generation != sequence >> 32) {
    throw std::invalid_argument("sequence " + text(sequence) + ": expected one of the " + text(num_sequences_) +
                                " live sequences, this one is unknown or was released");
  }
  return sequences_[slot];
}

PagedCache::Sequence& PagedCache::get(SequenceId sequence) {
  return const_cast<Sequence&>(static_cast<const PagedCache*>(this)->get(sequence));
}

void PagedCache::require_distinct(Span<const SequenceId> sequences) {
  ++call_;
  sequence_marks_.resize(sequences_.size(), 0);
  for (const SequenceId sequence : sequences) {
    get(sequence);
    std::int64_t& mark = sequence_marks_[static_cast<std::size_t>(sequence & 0xffffffff)];
    if (mark == call_) throw std::invalid_argument("sequence " + text(sequence) + ": expected once in a call, got twice");
    mark = call_;
  }
}

SequenceId PagedCache::new_sequence() {
  if (free_sequences_.empty()) {
    free_sequences_.reserve(sequences_.size() + 1);  // so that drop() never allocates
    sequences_.emplace_back();
    free_sequences_.push_back(sequences_.size() - 1);
  }
  const std::size_t slot = free_sequences_.back();
  free_sequences_.pop_back();
  Sequence& sequence = sequences_[slot];
  sequence.live = true;
  ++num_sequences_;
  return sequence.generation << 32 | static_cast<SequenceId>(slot);
}

SequenceId PagedCache::add() { return new_sequence(); }

SequenceId PagedCache::fork(SequenceId parent) {
  get(parent);  // throws before anything changes
  const SequenceId child = new_sequence();
  const Sequence& from = get(parent);  // only now: a new sequence may move the others
  Sequence& to = get(child);
  to.length = from.length;
  to.table = from.table;
  for (const BlockId block : to.table) allocator_.retain(block);
  return child;
}

std::vector<BlockCopy> PagedCache::reserve(Span<const SequenceId> sequences, Span<const std::int64_t> num_tokens,
                                           Span<std::int64_t> slot_mapping) {
  // First count, then change: a call that cannot be served whole must not be served in part.
  require_size("num_tokens", sequences.size, num_tokens.size);
  require_distinct(sequences);
  block_marks_.resize(static_cast<std::size_t>(allocator_.num_blocks()), 0);
  block_counts_.resize(block_marks_.size(), 0);
  std::int64_t needed = 0;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < sequences.size; ++i) {
    const Sequence& sequence = get(sequences[i]);
    const std::int64_t added = num_tokens[i];
    const std::int64_t capacity = max_blocks_ * block_size_;
    if (added < 0 || added > capacity - sequence.length) {
      throw std::invalid_argument("num_tokens: expected 0 to " + text(capacity - sequence.length) + " for sequence " +
                                  text(sequences[i]) + " of " + text(sequence.length) + " tokens (" +
                                  text(max_blocks_) + " blocks of " + text(block_size_) + "), got " + text(added));
    }
    total += added;
    needed += blocks_of(sequence.length + added) - static_cast<std::int64_t>(sequence.table.size());
    if (added > 0 && sequence.length % block_size_ != 0) {
      // Of the sequences that share a block, the last to write may keep it.
      const auto last = static_cast<std::size_t>(sequence.table.back());
      if (block_marks_[last] != call_) {
        block_marks_[last] = call_;
        block_counts_[last] = 0;
      }
      if (++block_counts_[last] < allocator_.references(sequence.table.back())) ++needed;
    }
  }
  if (needed > allocator_.num_free()) {
    throw OutOfBlocks(text(static_cast<std::int64_t>(sequences.size)) + " sequences need " + text(needed) +
                      " blocks, " + text(allocator_.num_free()) + " of " + text(allocator_.num_blocks()) +
                      " are free");
  }
  require_size("slot_mapping", static_cast<std::size_t>(total), slot_mapping.size);

  std::vector<BlockCopy> copies;
  std::size_t next = 0;
  for (std::size_t i = 0; i < sequences.size; ++i) {
    Sequence& sequence = get(sequences[i]);
    const std::int64_t end = sequence.length + num_tokens[i];
    if (num_tokens[i] > 0 && sequence.length % block_size_ != 0) {
      BlockId& last = sequence.table.back();
      if (allocator_.references(last) > 1) {
        const BlockId own = allocator_.allocate();
        copies.push_back({last, own});
        allocator_.release(last);
        last = own;
      }
    }
    while (static_cast<std::int64_t>(sequence.table.size()) < blocks_of(end)) {
      sequence.table.push_back(allocator_.allocate());
    }
    for (std::int64_t token = sequence.length; token < end; ++token) {
      const std::int64_t block = sequence.table[static_cast<std::size_t>(token / block_size_)];
      slot_mapping[next++] = block * block_size_ + token % block_size_;
    }
    sequence.length = end;
  }
  return copies;
}

void PagedCache::permute(Span<const SequenceId> sequences, Span<const std::int64_t> parents, std::int64_t tail) {
  require_size("parents", sequences.size, parents.size);
  if (sequences.size == 0) return;
  require_distinct(sequences);
  const auto count = static_cast<std::int64_t>(sequences.size);
  for (std::size_t i = 0; i < sequences.size; ++i) {
    if (parents[i] < 0 || parents[i] >= count) {
      throw std::invalid_argument("parents: expected 0 to " + text(count - 1) + ", got " + text(parents[i]));
    }
    const std::int64_t length = get(sequences[i]).length;
    if (tail < 0 || tail > length || (tail > 0 && (length - tail) % block_size_ != 0)) {
      throw std::invalid_argument("tail: expected 0, or so many of the " + text(length) + " tokens of sequence " +
                                  text(sequences[i]) + " that a multiple of " + text(block_size_) +
                                  " is left before them, got " + text(tail));
    }
    const std::vector<BlockId>& table = get(sequences[i]).table;
    for (auto block = table.end() - blocks_of(tail); block != table.end(); ++block) {
      if (allocator_.references(*block) != 1) {
        throw std::invalid_argument("tail: expected blocks that no other sequence holds, block " + text(*block) +
                                    " of sequence " + text(sequences[i]) + " is shared");
      }
    }
  }

  // Beams of a line soon agree on their beginning: only what differs is touched.
  if (changes_.size() < sequences.size) changes_.resize(sequences.size);
  const std::int64_t tail_blocks = blocks_of(tail);
  for (std::size_t i = 0; i < sequences.size; ++i) {
    Change& change = changes_[i];
    const Sequence& own = get(sequences[i]);
    const Sequence& parent = get(sequences[static_cast<std::size_t>(parents[i])]);
    const auto own_end = own.table.end() - tail_blocks;
    const auto parent_end = parent.table.end() - tail_blocks;
    const auto [differs, from] = std::mismatch(own.table.begin(), own_end, parent.table.begin(), parent_end);
    change.first = differs - own.table.begin();
    change.length = parent.length;
    change.table.assign(from, parent_end);
    for (const BlockId block : change.table) allocator_.retain(block);
    change.table.insert(change.table.end(), own_end, own.table.end());
  }
  // Released only when all are retained: a block may leave one table and enter another.
  for (std::size_t i = 0; i < sequences.size; ++i) {
    const Change& change = changes_[i];
    Sequence& own = get(sequences[i]);
    const auto differs = own.table.begin() + change.first;
    for (auto block = differs; block != own.table.end() - tail_blocks; ++block) allocator_.release(*block);
    own.table.erase(differs, own.table.end());
    own.table.insert(own.table.end(), change.table.begin(), change.table.end());
    own.length = change.length;
  }
}

void PagedCache::drop(SequenceId id) {
  Sequence& sequence = get(id);
  for (const BlockId block : sequence.table) allocator_.release(block);
  sequence.table.clear();
  sequence.length = 0;
  sequence.live = false;
  sequence.generation = (sequence.generation + 1) & 0x7fffffff;
  free_sequences_.push_back(static_cast<std::size_t>(id & 0xffffffff));
  --num_sequences_;
}

void PagedCache::release(Span<const SequenceId> sequences) {
  require_distinct(sequences);
  for (const SequenceId sequence : sequences) drop(sequence);
}

Detached PagedCache::detach(Span<const SequenceId> sequences, std::vector<BlockId>& blocks) {
  require_distinct(sequences);
  block_marks_.resize(static_cast<std::size_t>(allocator_.num_blocks()), 0);
  block_counts_.resize(block_marks_.size(), 0);
  Detached detached;
  detached.block_size = block_size_;
  blocks.clear();
  for (const SequenceId id : sequences) {
    const Sequence& sequence = get(id);
    detached.lengths.push_back(sequence.length);
    std::vector<BlockId> places;
    places.reserve(sequence.table.size());
    for (const BlockId block : sequence.table) {
      const auto index = static_cast<std::size_t>(block);
      if (block_marks_[index] != call_) {
        block_marks_[index] = call_;
        block_counts_[index] = static_cast<std::int32_t>(blocks.size());
        blocks.push_back(block);
      }
      places.push_back(block_counts_[index]);
    }
    detached.tables.push_back(std::move(places));
  }
  detached.num_blocks = static_cast<std::int64_t>(blocks.size());
  for (const SequenceId sequence : sequences) drop(sequence);
  return detached;
}

std::vector<BlockId> PagedCache::attach(const Detached& detached, std::vector<SequenceId>& sequences) {
  if (detached.block_size != block_size_) {
    throw std::invalid_argument("detached: expected sequences in blocks of " + text(block_size_) + ", got blocks of " +
                                text(detached.block_size));
  }
  for (const std::vector<BlockId>& table : detached.tables) {
    if (static_cast<std::int64_t>(table.size()) > max_blocks_) {
      throw std::invalid_argument("detached: expected tables of at most " + text(max_blocks_) + " blocks, got " +
                                  text(static_cast<std::int64_t>(table.size())));
    }
  }
  if (detached.num_blocks > allocator_.num_free()) {
    throw OutOfBlocks(text(static_cast<std::int64_t>(detached.tables.size())) + " detached sequences need " +
                      text(detached.num_blocks) + " blocks, " + text(allocator_.num_free()) + " of " +
                      text(allocator_.num_blocks()) + " are free");
  }
  std::vector<BlockId> blocks(static_cast<std::size_t>(detached.num_blocks));
  for (BlockId& block : blocks) block = allocator_.allocate();
  sequences.clear();
  for (std::size_t i = 0; i < detached.tables.size(); ++i) {
    const SequenceId id = new_sequence();
    Sequence& sequence = get(id);
    sequence.length = detached.lengths[i];
    for (const BlockId place : detached.tables[i]) {
      sequence.table.push_back(blocks[static_cast<std::size_t>(place)]);
      allocator_.retain(sequence.table.back());
    }
    sequences.push_back(id);
  }
  for (const BlockId block : blocks) allocator_.release(block);  // the tables hold them now
  return blocks;
}

void PagedCache::fill_tables(Span<const SequenceId> sequences, std::int32_t* tables, std::int64_t stride,
                             std::int32_t* lengths) const {
  for (const SequenceId id : sequences) {
    const auto held = static_cast<std::int64_t>(get(id).table.size());
    if (held > stride) {
      throw std::invalid_argument("tables: expected rows of at least " + text(held) + " entries for sequence " +
                                  text(id) + ", got " + text(stride));
    }
  }
  for (std::size_t i = 0; i < sequences.size; ++i) {
    const Sequence& sequence = get(sequences[i]);
    std::copy(sequence.table.begin(), sequence.table.end(), tables + static_cast<std::int64_t>(i) * stride);
    lengths[i] = static_cast<std::int32_t>(sequence.length);
  }
}

double PagedCache::utilisation() const {
  if (allocator_.num_used() == 0) return 1.0;
  std::vector<std::int64_t> filled(static_cast<std::size_t>(allocator_.num_blocks()), 0);
  for (const Sequence& sequence : sequences_) {
    for (std::size_t i = 0; i < sequence.table.size(); ++i) {
      const std::int64_t tokens = sequence.length - static_cast<std::int64_t>(i) * block_size_;
      std::int64_t& most = filled[static_cast<std::size_t>(sequence.table[i])];
      most = std::max(most, std::min(tokens, block_size_));
    }
  }
  std::int64_t total = 0;
  for (const std::int64_t tokens : filled) total += tokens;
  return static_cast<double>(total) / static_cast<double>(allocator_.num_used() * block_size_);
}

void PagedCache::check_integrity() const {
  allocator_.check_integrity();
  std::vector<std::int32_t> holders(static_cast<std::size_t>(allocator_.num_blocks()), 0);
  std::vector<std::size_t> last_holder(holders.size(), std::numeric_limits<std::size_t>::max());
  std::int64_t live = 0;
  for (std::size_t slot = 0; slot < sequences_.size(); ++slot) {
    const Sequence& sequence = sequences_[slot];
    live += sequence.live ? 1 : 0;
    if (static_cast<std::int64_t>(sequence.table.size()) != blocks_of(sequence.length)) {
      throw std::logic_error("a sequence of " + text(sequence.length) + " tokens holds " +
                             text(static_cast<std::int64_t>(sequence.table.size())) + " blocks of " +
                             text(block_size_));
    }
    for (const BlockId block : sequence.table) {
      allocator_.references(block);  // throws for a number that is no block
      const auto index = static_cast<std::size_t>(block);
      if (last_holder[index] == slot) throw std::logic_error("block " + text(block) + " is twice in one table");
      last_holder[index] = slot;
      ++holders[index];
    }
  }
  if (live != num_sequences_ || live + static_cast<std::int64_t>(free_sequences_.size()) !=
                                    static_cast<std::int64_t>(sequences_.size())) {
    throw std::logic_error(text(live) + " live sequences, counted as " + text(num_sequences_));
  }
  for (std::size_t block = 0; block < holders.size(); ++block) {
    const std::int32_t references = allocator_.references(static_cast<BlockId>(block));
    if (references != holders[block]) {
      throw std::logic_error("block " + text(static_cast<std::int64_t>(block)) + " has " + text(references) +
                             " references, " + text(holders[block]) + " tables hold it");
    }
  }
}

}  // namespace trocr_fast
