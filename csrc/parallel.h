// Work shared among threads, for attention on a CPU.
//
// By OpenMP, whose threads are then PyTorch's own (the loader takes the library that PyTorch has brought): threads of
// ours would compete with PyTorch's, which wait for their next work by spinning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trocr_fast {

// body(index, thread) for each index below `count`; `thread` is below `num_threads`. `body` must not throw.
template <typename Body>
void parallel_for(std::int64_t count, int num_threads, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (std::int64_t index = 0; index < count; ++index) body(index, omp_get_thread_num());
#else
  for (std::int64_t index = 0; index < count; ++index) body(index, 0 * num_threads);
#endif
}

// Pieces of memory, uninitialised, each on cache lines of its own: for each thread one, say.
class Scratch {
 public:
  Scratch(std::int64_t floats, std::int64_t pieces)
      : each_((floats + kLine - 1) / kLine * kLine),
        data_(static_cast<float*>(::operator new(static_cast<std::size_t>(each_ * pieces) * sizeof(float), kAlignment))) {}

  float* of(std::int64_t piece) const { return data_.get() + each_ * piece; }

 private:
  static constexpr std::int64_t kLine = 16;  // floats
  static constexpr std::align_val_t kAlignment{kLine * sizeof(float)};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::int64_t each_;
  std::unique_ptr<float, Free> data_;
};

}  // namespace trocr_fast
