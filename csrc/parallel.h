// Work shared among threads, for attention on a CPU.
//
// By OpenMP, whose threads are PyTorch's own where its library has the name that the compiler links against, as in the
// wheels for Linux: others would compete with PyTorch's, which wait for their next work by spinning.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace trocr_fast {

// body(index, thread) for each index below `count`; `thread` is below `num_threads`. `body` must not throw.
template <typename Body>
void parallel_for(std::int64_t count, int num_threads, const Body& body) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (std::int64_t index = 0; index < count; ++index) body(index, omp_get_thread_num());
}

// Some buffers of equal size, uninitialised, each on cache lines of its own: one a thread, say.
class Buffers {
 public:
  // Throws std::bad_alloc.
  Buffers(std::int64_t count, std::int64_t floats)
      : each_((floats + kLine - 1) / kLine * kLine),
        data_(static_cast<float*>(::operator new(static_cast<std::size_t>(each_ * count) * sizeof(float), kAlignment))) {}

  float* operator[](std::int64_t index) const { return data_.get() + each_ * index; }

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
