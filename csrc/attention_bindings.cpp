#include "attention_bindings.h"

#include <stdexcept>
#include <string>

#include "dlpack_tensor.h"
#include "encoder_attention.h"
#include "latent_cross_attention.h"
#include "simd.h"

namespace py = pybind11;

namespace trocr_fast {
namespace {

void require_fp32_on_cpu(const DLPackTensor& tensor) {
  tensor.require_dtype(dlpack::kFloat, 32);
  if (tensor.device().type != dlpack::kCpu) {
    throw std::invalid_argument(tensor.name() + ": expected on cpu, got " + DLPackTensor::text(tensor.device()));
  }
}

void require_threads_and_lanes(int num_threads, int lanes) {
  if (num_threads < 1) {
    throw std::invalid_argument("num_threads: expected 1 or more, got " + std::to_string(num_threads));
  }
  if ((lanes != 4 && lanes != 8 && lanes != 16) || lanes > simd::most_lanes()) {
    throw std::invalid_argument("lanes: expected 4, 8 or 16, and no more than this CPU's " +
                                std::to_string(simd::most_lanes()) + ", got " + std::to_string(lanes));
  }
}

void encoder_attention(const py::object& qkv_owner, std::int64_t num_heads, const py::object& out_owner,
                       int num_threads, int lanes) {
  const DLPackTensor qkv("qkv", qkv_owner), out("out", out_owner);
  require_fp32_on_cpu(qkv);
  require_fp32_on_cpu(out);
  qkv.require_shape({-1, -1, -1});
  const std::int64_t width = qkv.size(2) / 3;
  if (num_heads < 1 || qkv.size(2) % 3 != 0 || width % num_heads != 0) {
    throw std::invalid_argument("num_heads: expected a divisor of a third of " + std::to_string(qkv.size(2)) +
                                ", got " + std::to_string(num_heads));
  }
  out.require_shape({qkv.size(0), qkv.size(1), width});
  qkv.require_contiguous_from(0);
  out.require_contiguous_from(0);
  require_threads_and_lanes(num_threads, lanes);
  const cpu::EncoderAttention sizes{reinterpret_cast<const float*>(qkv.data()),
                                    reinterpret_cast<float*>(out.data()),
                                    qkv.size(0),
                                    qkv.size(1),
                                    num_heads,
                                    width / num_heads};
  const py::gil_scoped_release released;
  cpu::encoder_attention(sizes, num_threads, lanes);
}

void latent_cross_attention(const py::object& q_owner, const py::object& states_owner, const py::object& out_owner,
                            int num_threads, int lanes) {
  const DLPackTensor q("q", q_owner), states("states", states_owner), out("out", out_owner);
  for (const DLPackTensor* tensor : {&q, &states, &out}) require_fp32_on_cpu(*tensor);
  q.require_shape({-1, -1, -1});
  states.require_shape({-1, -1, q.size(2)});
  out.require_shape({q.size(0), q.size(1), q.size(2)});
  q.require_contiguous_from(2);
  states.require_contiguous_from(0);
  out.require_contiguous_from(0);
  const std::int64_t lines = states.size(0);
  if (lines == 0 ? q.size(0) != 0 : q.size(0) % lines != 0 || states.size(1) == 0) {
    throw std::invalid_argument("states: expected one or more keys of each of so many lines that they divide " +
                                std::to_string(q.size(0)) + " rows, got " + std::to_string(states.size(1)) +
                                " keys of " + std::to_string(lines) + " lines");
  }
  require_threads_and_lanes(num_threads, lanes);
  const cpu::LatentCrossAttention sizes{reinterpret_cast<const float*>(q.data()),
                                        q.stride(0),
                                        q.stride(1),
                                        reinterpret_cast<const float*>(states.data()),
                                        reinterpret_cast<float*>(out.data()),
                                        q.size(0),
                                        q.size(1),
                                        lines,
                                        states.size(1),
                                        q.size(2)};
  const py::gil_scoped_release released;
  cpu::latent_cross_attention(sizes, num_threads, lanes);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.attr("LANES") = simd::most_lanes();
  module.def("encoder_attention", &encoder_attention, py::arg("qkv"), py::arg("num_heads"), py::arg("out"),
             py::arg("num_threads"), py::arg("lanes") = simd::most_lanes());
  module.def("latent_cross_attention", &latent_cross_attention, py::arg("q"), py::arg("states"), py::arg("out"),
             py::arg("num_threads"), py::arg("lanes") = simd::most_lanes());
}

}  // namespace trocr_fast
