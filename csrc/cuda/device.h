// What the kernels share: stored types, aligned loads and the few machine operations written by hand. nvcc compiles it;
// so does a C++ compiler with FASTEDIT_EMULATE, which runs the threads of a block one after another (emulate.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef FASTEDIT_EMULATE
#include "cuda/emulate.h"
#define FASTEDIT_UNROLL
#define FASTEDIT_ROLLED
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTEDIT_UNROLL _Pragma("unroll")
#define FASTEDIT_ROLLED _Pragma("unroll 1")
#endif

namespace fastedit::gpu {

constexpr int kWarp = 32;
#ifdef FASTEDIT_EMULATE
constexpr int kThreads = 64;
#else
constexpr int kThreads = 256;
#endif
// One load or store of a thread.
constexpr int kVectorBytes = 16;

// 16-bit floats as stored; they are widened before anything is computed.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}
__device__ inline float widen(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

// To the nearest, ties to even.
template <class T>
struct Narrow {
  template <class A>
  __device__ static T from(A x) {
    return static_cast<T>(x);
  }
};

#ifdef FASTEDIT_EMULATE
template <>
struct Narrow<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
#else
template <>
struct Narrow<BFloat16> {
  __device__ static BFloat16 from(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};
__device__ inline float widen(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
template <>
struct Narrow<Float16> {
  __device__ static Float16 from(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};
#endif

// The larger one; a NaN is passed over.
__device__ inline float larger(float a, float b) {
  return ::fmaxf(a, b);
}
__device__ inline double larger(double a, double b) {
  return ::fmax(a, b);
}

// max(x, floor); a NaN stays one.
__device__ inline float at_least(float x, float floor) {
#ifdef FASTEDIT_EMULATE
  return x < floor ? floor : x;
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(floor));
  return y;
#endif
}
__device__ inline double at_least(double x, double floor) {
  return x < floor ? floor : x;
}

// N neighbours in memory, moved by one instruction.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int bytes>
struct Word;
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <class T, int N>
__device__ inline Pack<T, N> load(const Pack<T, N>* p) {
  using W = typename Word<sizeof(Pack<T, N>)>::Type;
  return bits_as<Pack<T, N>>(*reinterpret_cast<const W*>(p));
}
// Of memory that nobody writes while the kernel runs.
template <class T, int N>
__device__ inline Pack<T, N> load_constant(const Pack<T, N>* p) {
#ifdef FASTEDIT_EMULATE
  return load(p);
#else
  using W = typename Word<sizeof(Pack<T, N>)>::Type;
  return bits_as<Pack<T, N>>(__ldg(reinterpret_cast<const W*>(p)));
#endif
}
template <class T, int N>
__device__ inline void store(Pack<T, N>* p, const Pack<T, N>& value) {
  using W = typename Word<sizeof(Pack<T, N>)>::Type;
  *reinterpret_cast<W*>(p) = bits_as<W>(value);
}

// Widens a pack and lifts it to a floor; largest becomes the largest of these and of what it was, NaNs passed over.
template <class T, class A, int N>
__device__ inline void widen(const Pack<T, N>& pack, A floor, A* to, A& largest) {
  FASTEDIT_UNROLL
  for (int i = 0; i < N; ++i) {
    to[i] = at_least(A(widen(pack.at[i])), floor);
    largest = larger(largest, to[i]);
  }
}
// Two at a time where that takes one instruction: comparisons, before widening.
template <int N>
__device__ inline void widen(const Pack<BFloat16, N>& pack, float floor, float* to, float& largest) {
  struct Words {
    uint32_t at[N / 2];
  };
  const Words words = bits_as<Words>(pack);
  const uint16_t bits = Narrow<BFloat16>::from(floor).bits;
  const __nv_bfloat162 floors = bits_as<__nv_bfloat162>(static_cast<uint32_t>(bits) << 16 | bits);
  __nv_bfloat162 top = floors;
  FASTEDIT_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const __nv_bfloat162 two = __hmax2_nan(bits_as<__nv_bfloat162>(words.at[i]), floors);
    top = __hmax2(top, two);
    to[2 * i] = bits_as<float>(bits_as<uint32_t>(two) << 16);
    to[2 * i + 1] = bits_as<float>(bits_as<uint32_t>(two) & 0xffff0000u);
  }
  largest = larger(largest, larger(__low2float(top), __high2float(top)));
}

template <class A>
constexpr A kLog2E = A(1.4426950408889634074);
constexpr double kLn2 = 0.69314718055994530942;

// 2^x. In float32 the machine's own instruction, within 2 units in the last place over the whole range; results below
// 2^-126 are zero. expf() takes seven instructions more to round its argument x log2(e) twice as well. Here e^x with
// x <= 8 or so is a weight in a sum whose largest is 1 or more: that rounding costs it |x| e^x 2^-24, for x <= 0 at
// most 2^-25 of the largest weight, with signs as they fall.
__device__ inline float power2(float x) {
#ifdef FASTEDIT_EMULATE
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ inline double power2(double x) {
  return ::exp2(x);
}

}  // namespace fastedit::gpu
