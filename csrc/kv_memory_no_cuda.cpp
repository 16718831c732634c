// What stands for kv_memory_cuda.cu where there is no nvcc. No tensor on a device gets this far: bindings.cpp asks built().
#include <stdexcept>

#include "kv_memory.h"

namespace trocr_fast::cuda {

namespace {

[[noreturn]] void refuse() { throw std::logic_error("this build is CPU only"); }

}  // namespace

bool built() { return false; }

DeviceGuard::DeviceGuard(int) { refuse(); }
DeviceGuard::~DeviceGuard() = default;

void write(const KVMemory&, std::int64_t, const NewTokens&, Stream) { refuse(); }
void copy_blocks(const KVMemory&, const std::int32_t*, std::int64_t, Stream) { refuse(); }
void gather(const KVMemory&, std::int64_t, const Rows&, unsigned char*, unsigned char*, Stream) { refuse(); }
void swap_out(const KVMemory&, const std::int32_t*, std::int64_t, unsigned char*, Stream) { refuse(); }
void swap_in(const KVMemory&, const std::int32_t*, std::int64_t, const unsigned char*, Stream) { refuse(); }
void permute_tables(const TablePermutation&, Stream) { refuse(); }

}  // namespace trocr_fast::cuda
