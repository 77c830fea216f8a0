// Python's view of the compiled library: what it was built with and what this processor offers. The ops register
// themselves with torch when the library is loaded.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

const char* name(fastedit::Isa isa) {
  switch (isa) {
    case fastedit::Isa::avx512:
      return "avx512";
    case fastedit::Isa::avx2:
      return "avx2";
    default:
      return "none";
  }
}

py::dict build_info() {
  py::dict info;
  info["torch"] = FASTEDIT_TORCH_VERSION;
  info["cuda"] = FASTEDIT_CUDA_VERSION;  // empty when built without CUDA sources
  info["compiler"] = __VERSION__;
  return info;
}

void use_isa(const std::string& wanted) {
  for (fastedit::Isa isa : {fastedit::Isa::avx2, fastedit::Isa::avx512}) {
    if (wanted == name(isa) && isa <= fastedit::best_isa()) return fastedit::use_isa(isa);
  }
  throw std::invalid_argument("use_isa: the instruction set is one that this processor has (got " + wanted +
                              ", best=" + name(fastedit::best_isa()) + ")");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastedit.";
  m.def("build_info", &build_info, "Versions of torch, CUDA and the compiler that built the library.");
  m.def("best_isa", [] { return name(fastedit::best_isa()); }, "Best instruction set this processor has.");
  m.def("processor_vendor", &fastedit::processor_vendor, "Who made this processor: intel, amd or other.");
  m.def("current_isa", [] { return name(fastedit::current_isa()); }, "Instruction set in use.");
  m.def("release_kept_memory", &fastedit::release_kept_memory,
        "Give memory kept for large results back to the system; returns its bytes.");
  m.def("keep_freed_memory", &fastedit::keep_freed_memory,
        "Let torch take large blocks from those freed before, of which so many bytes are kept.");
  m.def("use_isa", &use_isa, "Choose an instruction set, for tests.");
}
