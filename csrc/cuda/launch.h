// From torch to the kernels: stored types by dtype, launches on a stream. Included by the .cu files only.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <type_traits>

#include "check.h"
#include "cuda/device.h"

namespace fastedit::gpu {

constexpr int64_t kMostBlocks = 0x7fffffff;

// Runs blocks of kThreads on a stream.
struct StreamLaunch {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    FASTEDIT_CHECK(blocks <= kMostBlocks, "fastedit", "a kernel runs at most 2^31 - 1 blocks", "blocks=", blocks);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

inline StreamLaunch current_stream() {
  return {c10::cuda::getCurrentCUDAStream()};
}

inline int multiprocessors(const at::Tensor& on) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.get_device()));
  return count;
}

// Calls body.operator()<T, A>() with the stored type T of the dtype and the type A of its sums.
template <class Body>
void dispatch(at::ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case at::kFloat:
      return body.template operator()<float, float>();
    case at::kDouble:
      return body.template operator()<double, double>();
    case at::kBFloat16:
      return body.template operator()<BFloat16, float>();
    case at::kHalf:
      return body.template operator()<Float16, float>();
    default:
      FASTEDIT_CHECK(false, op, "the dtype is float32, bfloat16, float16 or float64", "dtype=", dtype);
  }
}

// A tensor's data as the kernels' own types; T const for reading.
template <class T>
T* data(const at::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

}  // namespace fastedit::gpu
