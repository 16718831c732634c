// A torch tensor, borrowed through DLPack (https://dmlc.github.io/dlpack/latest/c_api.html).
//
// The structures are the protocol's unversioned ABI, which frameworks give unless asked for the versioned one.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace trocr_fast {

namespace dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null if contiguous
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack

// Holds the tensor's memory until destroyed. Needs the GIL to be made and destroyed.
class DLPackTensor {
 public:
  // Takes what `owner.__dlpack__(stream=-1)` gives: no synchronisation, the caller's stream orders the work.
  // Passes on what __dlpack__ raises (BufferError for a tensor that requires grad). Throws std::invalid_argument, with
  // `name` in front, if there is no __dlpack__.
  DLPackTensor(const char* name, const pybind11::object& owner) : name_(name) {
    if (!pybind11::hasattr(owner, "__dlpack__")) {
      throw std::invalid_argument(name_ + ": expected a tensor, got " +
                                  std::string(pybind11::str(pybind11::type::of(owner).attr("__name__"))));
    }
    const pybind11::object capsule = owner.attr("__dlpack__")(pybind11::arg("stream") = -1);
    managed_ = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed_ == nullptr || PyCapsule_SetName(capsule.ptr(), "used_dltensor") != 0) {
      throw pybind11::error_already_set();
    }
  }
  DLPackTensor(const DLPackTensor&) = delete;
  DLPackTensor& operator=(const DLPackTensor&) = delete;
  ~DLPackTensor() {
    if (managed_->deleter != nullptr) managed_->deleter(managed_);
  }

  const std::string& name() const { return name_; }
  dlpack::Device device() const { return tensor().device; }
  dlpack::DataType dtype() const { return tensor().dtype; }
  std::int64_t ndim() const { return tensor().ndim; }
  std::int64_t size(std::int64_t dim) const { return tensor().shape[dim]; }
  std::int64_t item_size() const { return tensor().dtype.bits / 8; }
  unsigned char* data() const { return static_cast<unsigned char*>(tensor().data) + tensor().byte_offset; }

  std::int64_t stride(std::int64_t dim) const {
    if (tensor().strides != nullptr) return tensor().strides[dim];
    std::int64_t stride = 1;
    for (std::int64_t i = dim + 1; i < ndim(); ++i) stride *= size(i);
    return stride;
  }

  // Whether the dimensions from `first` on lie side by side in memory, in order. Those of size 1 have any stride, and
  // so have all of an empty tensor.
  bool contiguous_from(std::int64_t first) const {
    for (std::int64_t dim = 0; dim < ndim(); ++dim) {
      if (size(dim) == 0) return true;
    }
    std::int64_t expected = 1;
    for (std::int64_t dim = ndim() - 1; dim >= first; --dim) {
      if (size(dim) != 1 && stride(dim) != expected) return false;
      expected *= size(dim);
    }
    return true;
  }

  // -1 stands for any size. Throws std::invalid_argument naming the tensor, what was expected and what came.
  void require_shape(const std::vector<std::int64_t>& expected) const {
    bool fits = ndim() == static_cast<std::int64_t>(expected.size());
    for (std::size_t dim = 0; fits && dim < expected.size(); ++dim) {
      fits = expected[dim] == -1 || expected[dim] == size(static_cast<std::int64_t>(dim));
    }
    if (fits) return;
    std::vector<std::int64_t> got;
    for (std::int64_t dim = 0; dim < ndim(); ++dim) got.push_back(size(dim));
    throw std::invalid_argument(name_ + ": expected shape " + text(expected) + ", got " + text(got));
  }

  void require_dtype(dlpack::TypeCode code, int bits) const {
    if (dtype().code == code && dtype().bits == bits && dtype().lanes == 1) return;
    const dlpack::DataType expected{code, static_cast<std::uint8_t>(bits), 1};
    throw std::invalid_argument(name_ + ": expected dtype " + text(expected) + ", got " + text(dtype()));
  }

  void require_dtype(const DLPackTensor& other) const {
    const dlpack::DataType expected = other.dtype();
    require_dtype(static_cast<dlpack::TypeCode>(expected.code), expected.bits);
  }

  void require_device(const DLPackTensor& other) const {
    if (device().type == other.device().type && device().id == other.device().id) return;
    throw std::invalid_argument(name_ + ": expected on " + text(other.device()) + " as " + other.name() + ", got " +
                                text(device()));
  }

  void require_contiguous_from(std::int64_t first) const {
    if (contiguous_from(first)) return;
    std::vector<std::int64_t> got;
    for (std::int64_t dim = 0; dim < ndim(); ++dim) got.push_back(stride(dim));
    throw std::invalid_argument(name_ + ": expected contiguous memory" +
                                (first == 0 ? "" : " from dimension " + std::to_string(first) + " on") +
                                ", got strides " + text(got));
  }

  static std::string text(const dlpack::Device& device) {
    switch (device.type) {
      case dlpack::kCpu: return "cpu";
      case dlpack::kCuda: return "cuda:" + std::to_string(device.id);
      case dlpack::kCudaHost: return "pinned host memory";
      default: return "device type " + std::to_string(device.type);
    }
  }

 private:
  const dlpack::Tensor& tensor() const { return managed_->tensor; }

  static std::string text(const std::vector<std::int64_t>& sizes) {
    std::string out = "[";
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      out += (i == 0 ? "" : ", ") + (sizes[i] == -1 ? std::string("any") : std::to_string(sizes[i]));
    }
    return out + "]";
  }

  static std::string text(const dlpack::DataType& dtype) {
    const char* kind = "type code ";
    switch (dtype.code) {
      case dlpack::kInt: kind = "int"; break;
      case dlpack::kUInt: kind = "uint"; break;
      case dlpack::kFloat: kind = "float"; break;
      case dlpack::kBfloat: kind = "bfloat"; break;
      default: return kind + std::to_string(dtype.code);
    }
    return kind + std::to_string(dtype.bits);
  }

  std::string name_;
  dlpack::ManagedTensor* managed_ = nullptr;
};

}  // namespace trocr_fast
