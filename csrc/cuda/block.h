// Sums and maxima over the threads of a block, always in the same order.
#pragma once

#include "cuda/device.h"

namespace fastedit::gpu {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = kThreads / kWarp;

// Every lane of the warp gets it.
template <class A>
__device__ inline A warp_max(A value) {
  FASTEDIT_UNROLL
  for (int other = kWarp / 2; other > 0; other /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, other));
  return value;
}

// Every lane of the warp gets it, the same bits.
__device__ inline double warp_sum(double value) {
  FASTEDIT_UNROLL
  for (int other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

// Every thread gets it.
template <class A>
__device__ inline A block_max(A value) {
  __shared__ A tops[kWarps];
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = tops[0];
  FASTEDIT_UNROLL
  for (int w = 1; w < kWarps; ++w) value = larger(value, tops[w]);
  // the next call writes there again
  __syncthreads();
  return value;
}

// The first thread gets the sums of N values.
template <int N>
__device__ inline void block_sums(double (&values)[N]) {
  __shared__ double sums[kWarps][N];
  FASTEDIT_UNROLL
  for (int i = 0; i < N; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp][i] = values[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    FASTEDIT_UNROLL
    for (int i = 0; i < N; ++i) {
      FASTEDIT_UNROLL
      for (int w = 1; w < kWarps; ++w) values[i] += sums[w][i];
    }
  }
  __syncthreads();
}

}  // namespace fastedit::gpu
