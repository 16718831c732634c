#pragma once

#include <pybind11/pybind11.h>

namespace trocr_fast {

// Adds attention on a CPU to the module.
void bind_attention(pybind11::module_& module);

}  // namespace trocr_fast
