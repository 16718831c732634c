// Replays traces of tests/csrc/cache_driver.py (the format stands there) without Python, for the sanitizers.
//
//   replay TRACE...              one after another
//   replay --threads N TRACE...  N threads, each replays all traces with caches of its own
//
// After each call: what it returned, the tables and lengths equal the trace, check_integrity() is content, and every
// sequence's bytes are its own. Exit status 1 and a line "FILE:LINE: what" if not.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/kv_memory.h"
#include "../../csrc/paged_attention.h"
#include "../../csrc/paged_cache.h"

namespace {

using trocr_fast::BlockId;
using trocr_fast::SequenceId;
using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t kLayers = 2, kHeads = 2, kHeadDim = 3;
constexpr float kPoison = -1.0F;

template <typename T>
trocr_fast::Span<const T> span(const std::vector<T>& values) {
  return {values.data(), values.size()};
}

Numbers widen(const std::vector<BlockId>& blocks) { return {blocks.begin(), blocks.end()}; }

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

void require_equal(const Numbers& got, const Numbers& expected, const char* what) {
  if (got == expected) return;
  std::ostringstream text;
  text << what << ": expected";
  for (const std::int64_t value : expected) text << ' ' << value;
  text << ", got";
  for (const std::int64_t value : got) text << ' ' << value;
  throw std::runtime_error(text.str());
}

// The words of a line, taken from the left.
class Line {
 public:
  explicit Line(const std::string& text) : words_(text) {}

  std::string word() {
    std::string out;
    require(static_cast<bool>(words_ >> out), "expected another word");
    return out;
  }
  std::int64_t number() { return std::stoll(word()); }
  Numbers list() {
    Numbers out(static_cast<std::size_t>(number()));
    for (std::int64_t& value : out) value = number();
    return out;
  }
  void arrow() { require(word() == "->", "expected ->"); }

 private:
  std::istringstream words_;
};

// A token's part of the keys or values: unique in a trace.
float value_of(std::int64_t token, std::int64_t layer, std::int64_t side, std::int64_t part) {
  return static_cast<float>(token * 32 + layer * 16 + side * 8 + part);
}

class Replay {
 public:
  Replay(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_blocks)
      : cache_(num_blocks, block_size, max_blocks) {
    resize();
  }

  // Makes the call of a line and compares what it returns with what stands there.
  void call(const std::string& text) {
    Line line(text);
    const std::string name = line.word();
    const bool out_of_blocks = ends_with(text, "-> out-of-blocks"), invalid = ends_with(text, "-> invalid");
    std::string result = "ok";
    try {
      make(name, line, !out_of_blocks && !invalid);
    } catch (const trocr_fast::OutOfBlocks&) {
      result = "out-of-blocks";
    } catch (const std::invalid_argument&) {
      result = "invalid";
    }
    require(result == (out_of_blocks ? "out-of-blocks" : invalid ? "invalid" : "ok"), "the call ended as " + result);
    cache_.check_integrity();
    check_bytes();
  }

 private:
  struct Saved {
    trocr_fast::Detached detached;
    std::vector<unsigned char> host;
    std::vector<Numbers> tokens;
  };

  static bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
  }

  void make(const std::string& name, Line& line, bool succeeds) {
    if (name == "add") {
      const SequenceId id = cache_.add();
      line.arrow();
      require_equal({id}, {line.number()}, "sequence");
      tokens_[id];
    } else if (name == "fork") {
      const SequenceId parent = line.number(), child = cache_.fork(parent);
      line.arrow();
      require_equal({child}, {line.number()}, "sequence");
      tokens_[child] = tokens_.at(parent);
    } else if (name == "reserve") {
      reserve(line);
    } else if (name == "permute") {
      const Numbers ids = line.list(), parents = line.list();
      const std::int64_t tail = line.number();
      cache_.permute(span(ids), span(parents), tail);
      const std::map<SequenceId, Numbers> before = tokens_;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const Numbers& own = before.at(ids[i]);
        Numbers tokens = before.at(ids[static_cast<std::size_t>(parents[i])]);
        tokens.resize(tokens.size() - static_cast<std::size_t>(tail));
        tokens.insert(tokens.end(), own.end() - tail, own.end());
        tokens_[ids[i]] = tokens;
      }
    } else if (name == "release") {
      const Numbers ids = line.list();
      cache_.release(span(ids));
      for (const SequenceId id : ids) tokens_.erase(id);
    } else if (name == "detach") {
      detach(line);
    } else if (name == "attach") {
      attach(line);
    } else if (name == "grow") {
      cache_.grow(line.number());
      resize();
    } else if (name == "length") {
      cache_.length(line.number());
    } else if (name == "state") {
      state(line);
    } else {
      throw std::runtime_error("unknown call " + name);
    }
    require(succeeds, "the call succeeded");
  }

  void reserve(Line& line) {
    const Numbers ids = line.list(), counts = line.list();
    // As in bindings.cpp: what a call that can succeed needs.
    const std::int64_t most =
        (cache_.allocator().num_free() + static_cast<std::int64_t>(ids.size())) * cache_.block_size();
    std::int64_t total = 0;
    for (const std::int64_t count : counts) total += count >= 0 && count <= most ? count : 0;
    Numbers slots(static_cast<std::size_t>(total <= most ? total : 0), -1);
    const std::vector<trocr_fast::BlockCopy> copies =
        cache_.reserve(span(ids), span(counts), {slots.data(), slots.size()});
    std::vector<std::int32_t> pairs;
    for (const trocr_fast::BlockCopy& copy : copies) {
      pairs.push_back(copy.source);
      pairs.push_back(copy.destination);
    }
    line.arrow();
    require_equal(slots, line.list(), "slot_mapping");
    require_equal(widen(pairs), line.list(), "copies");

    trocr_fast::cpu::copy_blocks(memory_, pairs.data(), static_cast<std::int64_t>(copies.size()));
    std::vector<float> k, v;
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      k.clear();
      v.clear();
      for (std::size_t i = 0; i < slots.size(); ++i) {
        for (std::int64_t part = 0; part < kHeads * kHeadDim; ++part) {
          k.push_back(value_of(num_tokens_ + static_cast<std::int64_t>(i), layer, 0, part));
          v.push_back(value_of(num_tokens_ + static_cast<std::int64_t>(i), layer, 1, part));
        }
      }
      trocr_fast::cpu::write(memory_, layer,
                             {reinterpret_cast<const unsigned char*>(k.data()),
                              reinterpret_cast<const unsigned char*>(v.data()), memory_.token_bytes(),
                              memory_.token_bytes(), slots.data(), static_cast<std::int64_t>(slots.size())});
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      for (std::int64_t count = 0; count < counts[i]; ++count) tokens_[ids[i]].push_back(num_tokens_++);
    }
  }

  void detach(Line& line) {
    const std::int64_t key = line.number();
    const Numbers ids = line.list();
    std::vector<BlockId> blocks;
    Saved saved;
    saved.detached = cache_.detach(span(ids), blocks);
    line.arrow();
    require_equal(widen(blocks), line.list(), "blocks");
    const auto count = static_cast<std::int64_t>(blocks.size());
    saved.host.resize(static_cast<std::size_t>(count * memory_.block_bytes()));
    trocr_fast::cpu::swap_out(memory_, blocks.data(), count, saved.host.data());
    for (const SequenceId id : ids) {
      saved.tokens.push_back(tokens_.at(id));
      tokens_.erase(id);
    }
    saved_[key] = saved;
  }

  void attach(Line& line) {
    const Saved& saved = saved_.at(line.number());
    Numbers ids;
    const std::vector<BlockId> blocks = cache_.attach(saved.detached, ids);
    line.arrow();
    require_equal(ids, line.list(), "sequences");
    require_equal(widen(blocks), line.list(), "blocks");
    trocr_fast::cpu::swap_in(memory_, blocks.data(), static_cast<std::int64_t>(blocks.size()), saved.host.data());
    for (std::size_t i = 0; i < ids.size(); ++i) tokens_[ids[i]] = saved.tokens[i];
  }

  void state(Line& line) {
    require_equal({cache_.allocator().num_free()}, {line.number()}, "num_free");
    const Numbers ids = line.list(), expected = line.list();
    require_equal({cache_.num_sequences()}, {static_cast<std::int64_t>(ids.size())}, "num_sequences");
    Numbers lengths, tables;
    for (const SequenceId id : ids) {
      lengths.push_back(cache_.length(id));
      const std::vector<BlockId>& table = cache_.table(id);
      tables.insert(tables.end(), table.begin(), table.end());
    }
    require_equal(lengths, expected, "lengths");
    require_equal(tables, line.list(), "tables");
    // What nobody holds is poison from here on.
    const std::int64_t block_values = memory_.block_bytes() / memory_.item_size;
    for (std::int64_t block = 0; block < cache_.allocator().num_blocks(); ++block) {
      if (cache_.allocator().references(static_cast<BlockId>(block)) != 0) continue;
      for (std::int64_t i = 0; i < block_values; ++i) {
        values_[static_cast<std::size_t>(block * block_values + i)] = kPoison;
      }
    }
  }

  void check_bytes() const {
    if (tokens_.empty()) return;
    Numbers ids;
    std::size_t longest = 0;
    for (const auto& [id, tokens] : tokens_) {
      ids.push_back(id);
      longest = std::max(longest, tokens.size());
    }
    const auto num_rows = static_cast<std::int64_t>(ids.size());
    const std::int64_t num_keys = static_cast<std::int64_t>(longest) + 1;  // one more: zeros
    std::vector<std::int32_t> tables(static_cast<std::size_t>(num_rows * cache_.max_blocks()), -7), lengths(ids.size());
    cache_.fill_tables(span(ids), tables.data(), cache_.max_blocks(), lengths.data());
    std::vector<float> sides[2];
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      for (auto& side : sides) side.assign(static_cast<std::size_t>(num_rows * kHeads * num_keys * kHeadDim), kPoison);
      trocr_fast::cpu::gather(memory_, layer, {tables.data(), cache_.max_blocks(), lengths.data(), num_rows, num_keys},
                              reinterpret_cast<unsigned char*>(sides[0].data()),
                              reinterpret_cast<unsigned char*>(sides[1].data()));
      std::size_t place = 0;
      for (const SequenceId id : ids) {
        const Numbers& tokens = tokens_.at(id);
        for (std::int64_t head = 0; head < kHeads; ++head) {
          for (std::size_t t = 0; t < static_cast<std::size_t>(num_keys); ++t) {
            for (std::int64_t dim = 0; dim < kHeadDim; ++dim, ++place) {
              for (std::int64_t side = 0; side < 2; ++side) {
                const float expected =
                    t < tokens.size() ? value_of(tokens[t], layer, side, head * kHeadDim + dim) : 0.0F;
                require(sides[side][place] == expected, "other bytes in token " + std::to_string(t) +
                                                            " of sequence " + std::to_string(id));
              }
            }
          }
        }
      }
      check_attention(layer, {tables.data(), cache_.max_blocks(), lengths.data(), num_rows, num_keys}, ids);
    }
  }

  // With queries of zero all tokens weigh the same.
  void check_attention(std::int64_t layer, const trocr_fast::Rows& rows, const Numbers& ids) const {
    const std::int64_t width = kHeads * kHeadDim;
    const std::vector<float> zeros(static_cast<std::size_t>(rows.num_rows * width));
    const Numbers nowhere(ids.size(), -1);
    std::vector<float> out(zeros.size(), kPoison);
    const auto* nothing = reinterpret_cast<const unsigned char*>(zeros.data());
    trocr_fast::cpu::attend(memory_, layer,
                            {nothing, nothing, memory_.token_bytes(), memory_.token_bytes(), nowhere.data(),
                             rows.num_rows},
                            rows, zeros.data(), width, out.data());
    std::size_t place = 0;
    for (const SequenceId id : ids) {
      const Numbers& tokens = tokens_.at(id);
      for (std::int64_t part = 0; part < width; ++part, ++place) {
        double expected = 0;
        for (const std::int64_t token : tokens) expected += value_of(token, layer, 1, part);
        if (!tokens.empty()) expected /= static_cast<double>(tokens.size());
        require(std::abs(out[place] - expected) <= 1e-4 * (1 + std::abs(expected)),
                "another mean of the values of sequence " + std::to_string(id));
      }
    }
  }

  void resize() {
    memory_ = {nullptr, cache_.allocator().num_blocks(), kLayers, cache_.block_size(), kHeads, kHeadDim, sizeof(float)};
    values_.resize(static_cast<std::size_t>(memory_.num_blocks * memory_.block_bytes()) / sizeof(float), kPoison);
    memory_.data = reinterpret_cast<unsigned char*>(values_.data());
  }

  trocr_fast::PagedCache cache_;
  std::vector<float> values_;
  trocr_fast::KVMemory memory_{};
  std::map<SequenceId, Numbers> tokens_;
  std::map<std::int64_t, Saved> saved_;
  std::int64_t num_tokens_ = 0;
};

// The number of lines, or -1 after an error that is printed.
std::int64_t replay(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::int64_t number = 1;
  try {
    require(static_cast<bool>(std::getline(file, text)), "expected a trace");
    Line first(text);
    require(first.word() == "cache", "expected cache in the first line");
    const std::int64_t num_blocks = first.number(), block_size = first.number();
    Replay cache(num_blocks, block_size, first.number());
    while (std::getline(file, text)) {
      ++number;
      cache.call(text);
    }
  } catch (const std::exception& error) {
    std::cerr << path + ":" + std::to_string(number) + ": " + error.what() + "\n";
    return -1;
  }
  return number;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> paths(argv + 1, argv + argc);
  std::size_t num_threads = 1;
  if (paths.size() >= 2 && paths[0] == "--threads") {
    num_threads = std::stoul(paths[1]);
    paths.erase(paths.begin(), paths.begin() + 2);
  }
  if (paths.empty() || num_threads == 0) {
    std::cerr << "usage: replay [--threads N] TRACE...\n";
    return 2;
  }
  std::vector<std::int64_t> lines(num_threads, 0);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < num_threads; ++i) {
    threads.emplace_back([&paths, &total = lines[i]] {
      for (const std::string& path : paths) {
        const std::int64_t count = replay(path);
        if (count < 0) {
          total = std::numeric_limits<std::int64_t>::min();
          return;
        }
        total += count;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::int64_t count : lines) {
    if (count < 0) return 1;
  }
  std::cout << paths.size() << " traces, " << lines[0] << " lines, " << num_threads << " threads: as recorded\n";
  return 0;
}
