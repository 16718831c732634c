// The Python module trocr_fast._csrc.
//
// Threads: an object is used by one thread at a time. Calls of BlockAllocator and PagedCache keep the GIL (they take
// microseconds), so that concurrent use from Python is at worst a mixed-up order; calls that move bytes release it.
// Streams: a call on a CUDA tensor is enqueued on the stream that is passed in, cudaStream_t as an integer.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>

#include "attention_bindings.h"
#include "block_allocator.h"
#include "dlpack_tensor.h"
#include "kv_memory.h"
#include "paged_attention.h"
#include "paged_cache.h"

namespace py = pybind11;

namespace trocr_fast {
namespace {

// Integers from an array or a sequence, kept alive as long as they are looked at. numpy alone would turn 1.5 into 1.
class Integers {
 public:
  Integers(const char* name, const py::object& values) {
    const py::array given = py::array::ensure(values);
    if (!given) {
      PyErr_Clear();
      throw std::invalid_argument(std::string(name) + ": expected integers, got " +
                                  std::string(py::str(py::type::of(values).attr("__name__"))));
    }
    const char kind = given.dtype().kind();
    if ((kind != 'i' && kind != 'u' && given.size() > 0) || given.dtype().itemsize() > 8) {
      throw std::invalid_argument(std::string(name) + ": expected integers, got " +
                                  std::string(py::str(given.dtype())));
    }
    if (given.ndim() > 1) {
      throw std::invalid_argument(std::string(name) + ": expected one dimension, got " + std::to_string(given.ndim()));
    }
    values_ = Values::ensure(given);
    if (!values_) throw py::error_already_set();
  }

  bool scalar() const { return values_.ndim() == 0; }
  Span<const std::int64_t> span() const { return {values_.data(), static_cast<std::size_t>(values_.size())}; }

 private:
  using Values = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
  Values values_;
};

template <typename T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple reserve(PagedCache& cache, const py::object& sequences, const py::object& num_tokens) {
  const Integers held("sequences", sequences);
  const Integers given("num_tokens", num_tokens);
  const Span<const SequenceId> ids = held.span();
  Span<const std::int64_t> counts = given.span();
  std::vector<std::int64_t> same;
  if (given.scalar()) {
    same.assign(ids.size, counts[0]);
    counts = {same.data(), same.size()};
  }
  // Of a call that can succeed; reserve() explains what is wrong with any other before it looks at slot_mapping.
  const std::int64_t capacity = cache.max_blocks() * cache.block_size();
  const std::int64_t most = (cache.allocator().num_free() + static_cast<std::int64_t>(ids.size)) * cache.block_size();
  std::int64_t total = 0;
  for (const std::int64_t count : counts) total += count >= 0 && count <= capacity ? count : 0;
  if (total > most) total = 0;
  py::array_t<std::int64_t> slot_mapping(total);
  const std::vector<BlockCopy> copies =
      cache.reserve(ids, counts, {slot_mapping.mutable_data(), static_cast<std::size_t>(total)});
  py::array_t<std::int32_t> pairs({static_cast<py::ssize_t>(copies.size()), py::ssize_t{2}});
  std::int32_t* out = pairs.mutable_data();
  for (const BlockCopy& copy : copies) {
    *out++ = copy.source;
    *out++ = copy.destination;
  }
  return py::make_tuple(slot_mapping, pairs);
}

void fill_tables(const PagedCache& cache, const py::object& sequences, py::array_t<std::int32_t, 0> tables,
                 py::array_t<std::int32_t, 0> lengths) {
  const Integers held("sequences", sequences);
  const Span<const SequenceId> ids = held.span();
  const auto rows = static_cast<py::ssize_t>(ids.size);
  if (tables.ndim() != 2 || tables.shape(0) < rows || tables.strides(1) != sizeof(std::int32_t) ||
      tables.strides(0) != tables.shape(1) * static_cast<py::ssize_t>(sizeof(std::int32_t))) {
    throw std::invalid_argument("tables: expected contiguous int32 [at least " + std::to_string(rows) +
                                ", max_blocks], got " + std::string(py::str(tables.attr("shape"))) + ", strides " +
                                std::string(py::str(tables.attr("strides"))));
  }
  if (lengths.ndim() != 1 || lengths.shape(0) < rows || lengths.strides(0) != sizeof(std::int32_t)) {
    throw std::invalid_argument("lengths: expected contiguous int32 [at least " + std::to_string(rows) + "], got " +
                                std::string(py::str(lengths.attr("shape"))));
  }
  cache.fill_tables(ids, tables.mutable_data(), tables.shape(1), lengths.mutable_data());
}

// The tensor that holds the blocks' bytes, bound once.
class BoundMemory {
 public:
  explicit BoundMemory(const py::object& owner) : tensor_(std::make_unique<DLPackTensor>("memory", owner)) {
    tensor_->require_shape({-1, -1, 2, -1, -1, -1});
    tensor_->require_contiguous_from(0);
    const dlpack::DataType dtype = tensor_->dtype();
    const bool known = (dtype.code == dlpack::kFloat && (dtype.bits == 16 || dtype.bits == 32)) ||
                       (dtype.code == dlpack::kBfloat && dtype.bits == 16);
    if (!known || dtype.lanes != 1) {
      throw std::invalid_argument("memory: expected dtype float32, float16 or bfloat16, got type code " +
                                  std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits");
    }
    for (std::int64_t dim = 0; dim < 6; ++dim) {
      if (tensor_->size(dim) < 1) throw std::invalid_argument("memory: expected no empty dimension");
    }
    require_supported();
    memory_ = {tensor_->data(),  tensor_->size(0), tensor_->size(1),     tensor_->size(3),
               tensor_->size(4), tensor_->size(5), tensor_->item_size()};
  }

  void write(std::int64_t layer, const py::object& k_owner, const py::object& v_owner, const py::object& slots_owner,
             std::uintptr_t stream) {
    require_layer(layer);
    const DLPackTensor k("k", k_owner), v("v", v_owner), slots("slot_mapping", slots_owner);
    const NewTokens tokens = new_tokens(k, v, slots);
    run([&] { cpu::write(memory_, layer, tokens); }, [&](cuda::Stream s) { cuda::write(memory_, layer, tokens, s); }, stream);
  }

  void copy_blocks(const py::object& pairs_owner, std::uintptr_t stream) {
    const DLPackTensor pairs("pairs", pairs_owner);
    pairs.require_dtype(dlpack::kInt, 32);
    pairs.require_shape({-1, 2});
    pairs.require_contiguous_from(0);
    pairs.require_device(*tensor_);
    const auto* data = reinterpret_cast<const std::int32_t*>(pairs.data());
    run([&] { cpu::copy_blocks(memory_, data, pairs.size(0)); },
        [&](cuda::Stream s) { cuda::copy_blocks(memory_, data, pairs.size(0), s); }, stream);
  }

  void gather(std::int64_t layer, const py::object& tables_owner, const py::object& lengths_owner,
              const py::object& k_owner, const py::object& v_owner, std::uintptr_t stream) {
    require_layer(layer);
    const DLPackTensor tables("block_tables", tables_owner), lengths("context_lens", lengths_owner);
    const DLPackTensor k("k", k_owner), v("v", v_owner);
    Rows rows = checked_rows(tables, lengths);
    k.require_shape({lengths.size(0), memory_.num_heads, -1, memory_.head_dim});
    v.require_shape({lengths.size(0), memory_.num_heads, k.size(2), memory_.head_dim});
    for (const DLPackTensor* side : {&k, &v}) {
      side->require_dtype(*tensor_);
      side->require_contiguous_from(0);
      side->require_device(*tensor_);
    }
    rows.num_keys = k.size(2);
    run([&] { cpu::gather(memory_, layer, rows, k.data(), v.data()); },
        [&](cuda::Stream s) { cuda::gather(memory_, layer, rows, k.data(), v.data(), s); }, stream);
  }

  void attend(std::int64_t layer, const py::object& q_owner, const py::object& k_owner, const py::object& v_owner,
              const py::object& tables_owner, const py::object& lengths_owner, const py::object& slots_owner,
              const py::object& out_owner) {
    if (tensor_->device().type != dlpack::kCpu || memory_.item_size != sizeof(float)) {
      throw std::invalid_argument("memory: expected float32 on the CPU, got values of " +
                                  std::to_string(memory_.item_size) + " bytes on " +
                                  DLPackTensor::text(tensor_->device()));
    }
    require_layer(layer);
    const DLPackTensor q("q", q_owner), k("k", k_owner), v("v", v_owner), slots("slot_mapping", slots_owner);
    const DLPackTensor tables("block_tables", tables_owner), lengths("context_lens", lengths_owner);
    const DLPackTensor out("out", out_owner);
    const NewTokens tokens = new_tokens(k, v, slots);
    const Rows rows = checked_rows(tables, lengths);
    lengths.require_shape({tokens.num_tokens});
    require_tokens(q, tokens.num_tokens);
    out.require_dtype(*tensor_);
    out.require_shape({tokens.num_tokens, memory_.num_heads * memory_.head_dim});
    out.require_contiguous_from(0);
    out.require_device(*tensor_);
    const py::gil_scoped_release released;
    cpu::attend(memory_, layer, tokens, rows, reinterpret_cast<const float*>(q.data()),
                byte_stride(q) / memory_.item_size, reinterpret_cast<float*>(out.data()));
  }

  void swap(bool out, const py::object& blocks, const py::object& host_owner, std::uintptr_t stream) {
    const Integers held("blocks", blocks);
    std::vector<std::int32_t> list;
    for (const std::int64_t block : held.span()) {
      if (block < 0 || block >= memory_.num_blocks) {
        throw std::invalid_argument("blocks: expected 0 to " + std::to_string(memory_.num_blocks - 1) + ", got " +
                                    std::to_string(block));
      }
      list.push_back(static_cast<std::int32_t>(block));
    }
    const auto count = static_cast<std::int64_t>(list.size());
    const DLPackTensor host("host", host_owner);
    host.require_dtype(*tensor_);
    host.require_shape({count, memory_.num_layers, 2, memory_.block_size, memory_.num_heads, memory_.head_dim});
    host.require_contiguous_from(0);
    if (host.device().type != dlpack::kCpu && host.device().type != dlpack::kCudaHost) {
      throw std::invalid_argument("host: expected host memory, got " + DLPackTensor::text(host.device()));
    }
    run([&] { out ? cpu::swap_out(memory_, list.data(), count, host.data())
                  : cpu::swap_in(memory_, list.data(), count, host.data()); },
        [&](cuda::Stream s) {
          out ? cuda::swap_out(memory_, list.data(), count, host.data(), s)
              : cuda::swap_in(memory_, list.data(), count, host.data(), s);
        }, stream);
  }

 private:
  void require_supported() const {
    const dlpack::Device device = tensor_->device();
    if (device.type == dlpack::kCpu || (device.type == dlpack::kCuda && cuda::built())) return;
    throw std::invalid_argument(std::string("memory: expected a tensor on the CPU") +
                                (cuda::built() ? " or on a CUDA device" : ", since this build is CPU only") +
                                ", got one on " + DLPackTensor::text(device));
  }

  void require_layer(std::int64_t layer) const {
    if (layer < 0 || layer >= memory_.num_layers) {
      throw std::invalid_argument("layer: expected 0 to " + std::to_string(memory_.num_layers - 1) + ", got " +
                                  std::to_string(layer));
    }
  }

  // [num_tokens, num_heads, head_dim] with a free first stride.
  void require_tokens(const DLPackTensor& tensor, std::int64_t num_tokens) const {
    tensor.require_dtype(*tensor_);
    tensor.require_shape({num_tokens, memory_.num_heads, memory_.head_dim});
    tensor.require_contiguous_from(1);
    tensor.require_device(*tensor_);
  }

  // From token to token; torch gives a single one any.
  std::int64_t byte_stride(const DLPackTensor& tensor) const {
    return tensor.size(0) == 1 ? 0 : tensor.stride(0) * memory_.item_size;
  }

  NewTokens new_tokens(const DLPackTensor& k, const DLPackTensor& v, const DLPackTensor& slots) const {
    slots.require_dtype(dlpack::kInt, 64);
    slots.require_shape({-1});
    slots.require_contiguous_from(0);
    slots.require_device(*tensor_);
    for (const DLPackTensor* side : {&k, &v}) require_tokens(*side, slots.size(0));
    return {k.data(), v.data(), byte_stride(k), byte_stride(v), reinterpret_cast<const std::int64_t*>(slots.data()),
            slots.size(0)};
  }

  Rows checked_rows(const DLPackTensor& tables, const DLPackTensor& lengths) const {
    lengths.require_shape({-1});
    tables.require_shape({lengths.size(0), -1});
    for (const DLPackTensor* indices : {&tables, &lengths}) {
      indices->require_dtype(dlpack::kInt, 32);
      indices->require_contiguous_from(0);
      indices->require_device(*tensor_);
    }
    return {reinterpret_cast<const std::int32_t*>(tables.data()), tables.size(1),
            reinterpret_cast<const std::int32_t*>(lengths.data()), lengths.size(0),
            std::numeric_limits<std::int64_t>::max()};
  }

  // One of the two twins, without the GIL.
  template <typename OnCpu, typename OnCuda>
  void run(OnCpu on_cpu, OnCuda on_cuda, std::uintptr_t stream) {
    const py::gil_scoped_release released;
    if (tensor_->device().type == dlpack::kCuda) {
      const cuda::DeviceGuard guard(tensor_->device().id);
      on_cuda(reinterpret_cast<cuda::Stream>(stream));
    } else {
      on_cpu();
    }
  }

  std::unique_ptr<DLPackTensor> tensor_;
  KVMemory memory_{};
};

void permute_block_tables(const py::object& source_owner, const py::object& destination_owner,
                          const py::object& parents_owner, const py::object& prefix_owner,
                          std::uintptr_t stream) {
  const DLPackTensor source("source", source_owner), destination("destination", destination_owner);
  const DLPackTensor parents("parents", parents_owner), prefix("prefix_blocks", prefix_owner);
  source.require_shape({-1, -1});
  destination.require_shape({source.size(0), source.size(1)});
  parents.require_shape({source.size(0)});
  prefix.require_shape({source.size(0)});
  parents.require_dtype(dlpack::kInt, 64);
  for (const DLPackTensor* tensor : {&source, &destination, &prefix}) tensor->require_dtype(dlpack::kInt, 32);
  for (const DLPackTensor* tensor : {&source, &destination, &parents, &prefix}) {
    tensor->require_contiguous_from(0);
    tensor->require_device(source);
  }
  const std::int64_t bytes = source.size(0) * source.size(1) * source.item_size();
  if (source.data() < destination.data() + bytes && destination.data() < source.data() + bytes) {
    throw std::invalid_argument("destination: expected another memory than source, got one that overlaps it");
  }
  const TablePermutation permutation{reinterpret_cast<const std::int32_t*>(source.data()),
                                     reinterpret_cast<std::int32_t*>(destination.data()),
                                     source.size(0),
                                     source.size(1),
                                     reinterpret_cast<const std::int64_t*>(parents.data()),
                                     reinterpret_cast<const std::int32_t*>(prefix.data())};
  const bool on_cuda = source.device().type == dlpack::kCuda && cuda::built();
  if (!on_cuda && source.device().type != dlpack::kCpu) {
    throw std::invalid_argument("source: expected a device of this build, got " + DLPackTensor::text(source.device()));
  }
  const py::gil_scoped_release released;
  if (!on_cuda) return cpu::permute_tables(permutation);
  const cuda::DeviceGuard guard(source.device().id);
  cuda::permute_tables(permutation, reinterpret_cast<cuda::Stream>(stream));
}

}  // namespace
}  // namespace trocr_fast

PYBIND11_MODULE(_csrc, module) {
  using namespace trocr_fast;
  module.doc() = "Block allocator, paged KV cache and the memory behind it, attention on a CPU. Sources and contracts: csrc/.";
  module.attr("BUILD") = cuda::built() ? "cuda" : "cpu";
  py::register_exception<OutOfBlocks>(module, "OutOfBlocks", PyExc_RuntimeError);

  py::class_<BlockAllocator>(module, "BlockAllocator")
      .def(py::init<std::int64_t>(), py::arg("num_blocks"))
      .def("allocate", &BlockAllocator::allocate)
      .def("retain", &BlockAllocator::retain, py::arg("block"))
      .def("release", &BlockAllocator::release, py::arg("block"))
      .def("grow", &BlockAllocator::grow, py::arg("num_blocks"))
      .def("references", &BlockAllocator::references, py::arg("block"))
      .def("check_integrity", &BlockAllocator::check_integrity)
      .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
      .def_property_readonly("num_free", &BlockAllocator::num_free)
      .def_property_readonly("num_used", &BlockAllocator::num_used);

  py::class_<Detached>(module, "Detached", "Sequences taken out of a cache; their bytes are kept by the caller.")
      .def_readonly("num_blocks", &Detached::num_blocks)
      .def_readonly("lengths", &Detached::lengths);

  py::class_<PagedCache>(module, "PagedCache")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t>(), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_blocks"))
      .def("add", &PagedCache::add)
      .def("fork", &PagedCache::fork, py::arg("parent"))
      .def("reserve", &reserve, py::arg("sequences"), py::arg("num_tokens") = 1)
      .def(
          "permute",
          [](PagedCache& cache, const py::object& sequences, const py::object& parents, std::int64_t tail) {
            cache.permute(Integers("sequences", sequences).span(),
                          Integers("parents", parents).span(), tail);
          },
          py::arg("sequences"), py::arg("parents"), py::arg("tail") = 0)
      .def(
          "release",
          [](PagedCache& cache, const py::object& sequences) {
            cache.release(Integers("sequences", sequences).span());
          },
          py::arg("sequences"))
      .def(
          "detach",
          [](PagedCache& cache, const py::object& sequences) {
            std::vector<BlockId> blocks;
            Detached detached = cache.detach(Integers("sequences", sequences).span(), blocks);
            return py::make_tuple(std::move(detached), array(blocks));
          },
          py::arg("sequences"))
      .def(
          "attach",
          [](PagedCache& cache, const Detached& detached) {
            std::vector<SequenceId> sequences;
            const std::vector<BlockId> blocks = cache.attach(detached, sequences);
            return py::make_tuple(array(sequences), array(blocks));
          },
          py::arg("detached"))
      .def("grow", &PagedCache::grow, py::arg("num_blocks"))
      .def("fill_tables", &fill_tables, py::arg("sequences"), py::arg("tables").noconvert(),
           py::arg("lengths").noconvert())
      .def(
          "table", [](const PagedCache& cache, SequenceId sequence) { return array(cache.table(sequence)); },
          py::arg("sequence"))
      .def("length", &PagedCache::length, py::arg("sequence"))
      .def(
          "references",
          [](const PagedCache& cache, BlockId block) { return cache.allocator().references(block); },
          py::arg("block"))
      .def("utilisation", &PagedCache::utilisation)
      .def("check_integrity", &PagedCache::check_integrity)
      .def_property_readonly("block_size", &PagedCache::block_size)
      .def_property_readonly("max_blocks", &PagedCache::max_blocks)
      .def_property_readonly("num_sequences", &PagedCache::num_sequences)
      .def_property_readonly("num_blocks", [](const PagedCache& cache) { return cache.allocator().num_blocks(); })
      .def_property_readonly("num_free", [](const PagedCache& cache) { return cache.allocator().num_free(); })
      .def_property_readonly("num_used", [](const PagedCache& cache) { return cache.allocator().num_used(); });

  py::class_<BoundMemory>(module, "KVMemory")
      .def(py::init<const py::object&>(), py::arg("memory"))
      .def("write", &BoundMemory::write, py::arg("layer"), py::arg("k"), py::arg("v"), py::arg("slot_mapping"),
           py::arg("stream") = 0)
      .def("copy_blocks", &BoundMemory::copy_blocks, py::arg("pairs"), py::arg("stream") = 0)
      .def("gather", &BoundMemory::gather, py::arg("layer"), py::arg("block_tables"), py::arg("context_lens"),
           py::arg("k"), py::arg("v"), py::arg("stream") = 0)
      .def("attend", &BoundMemory::attend, py::arg("layer"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("block_tables"), py::arg("context_lens"), py::arg("slot_mapping"), py::arg("out"))
      .def(
          "swap_out",
          [](BoundMemory& memory, const py::object& blocks, const py::object& host, std::uintptr_t stream) {
            memory.swap(true, blocks, host, stream);
          },
          py::arg("blocks"), py::arg("host"), py::arg("stream") = 0)
      .def(
          "swap_in",
          [](BoundMemory& memory, const py::object& blocks, const py::object& host, std::uintptr_t stream) {
            memory.swap(false, blocks, host, stream);
          },
          py::arg("blocks"), py::arg("host"), py::arg("stream") = 0);

  module.def("permute_tables", &permute_block_tables, py::arg("source"), py::arg("destination"), py::arg("parents"),
             py::arg("prefix_blocks"), py::arg("stream") = 0);

  bind_attention(module);
}
