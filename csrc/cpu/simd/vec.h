// Vectors of float and double for the instruction set this file is compiled for. Sources in this folder are compiled
// once per set and include nothing that could be emitted as a shared inline function (no ATen, no containers): the
// linker might keep the AVX-512 copy of one for everybody.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/isa.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#if defined(__AVX512F__)
#define FASTEDIT_ISA avx512
#elif defined(__AVX2__)
#define FASTEDIT_ISA avx2
#else
#error "compiled for AVX2 or AVX-512"
#endif

namespace fastedit::FASTEDIT_ISA {

#define FASTEDIT_INLINE static inline __attribute__((always_inline))

// Where n numbers of at most width are read or written by an instruction that no sanitizer looks at: a masked move, one
// past the caches. In a library built with AddressSanitizer it is told of them.
template <int width, class T>
FASTEDIT_INLINE T* touched(T* p, [[maybe_unused]] int64_t n) {
#ifdef __SANITIZE_ADDRESS__
  const int64_t count = n < width ? n : width;
  void* wrong = count > 0 ? __asan_region_is_poisoned(const_cast<void*>(static_cast<const void*>(p)),
                                                      static_cast<size_t>(count) * sizeof(T))
                          : nullptr;
  // read there, which it reports
  if (wrong != nullptr) static_cast<void>(*static_cast<volatile const char*>(wrong));
#endif
  return p;
}

template <class S>
struct Vec;

#if defined(__AVX512F__)

constexpr int kRegisters = 32;

FASTEDIT_INLINE __mmask16 first16(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}
FASTEDIT_INLINE __mmask8 first8(int64_t n) {
  return n >= 8 ? 0xff : static_cast<__mmask8>((1u << n) - 1);
}

template <>
struct Vec<float> {
  static constexpr int width = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first16(n), touched<16>(p, n))}; }
  static Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const BFloat16* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first16(n), touched<16>(p, n)));
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const Float16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), touched<16>(p, n)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(touched<16>(p, n), first16(n), v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(BFloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(touched<16>(p, n), first16(n), narrow()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(Float16* p, int64_t n) const { _mm256_mask_storeu_epi16(touched<16>(p, n), first16(n), half()); }
  // past the caches, for aligned planes that nobody reads soon; needs a fence before another thread reads
  void stream(float* p) const { _mm512_stream_ps(touched<width>(p, width), v); }
  void stream(BFloat16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(touched<width>(p, width)), narrow());
  }
  void stream(Float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(touched<width>(p, width)), half()); }

  static Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
  // Round to nearest, ties to even; a NaN stays one.
  __m256i narrow() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  // max and min return b where a is NaN
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  // relative error 2^-14
  friend Vec rough_inverse_sqrt(Vec a) { return {_mm512_rsqrt14_ps(a.v)}; }
  friend Vec rough_inverse(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  // the last eight bits as an exponent: 2^(b - 127) for bits b
  friend Vec last_bits_as_exponent(Vec a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
  }
  // b where the lane is below n, a elsewhere
  friend Vec first(Vec a, Vec b, int64_t n) { return {_mm512_mask_mov_ps(a.v, first16(n), b.v)}; }
  // a where x >= bound (or x is NaN), 0 elsewhere
  friend Vec where_from(Vec x, Vec bound, Vec a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
  }
  friend float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
  friend float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
};

template <>
struct Vec<double> {
  static constexpr int width = 8;
  __m512d v;
  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec set(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first8(n), touched<8>(p, n))}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int64_t n) const { _mm512_mask_storeu_pd(touched<8>(p, n), first8(n), v); }
  void stream(double* p) const { _mm512_stream_pd(touched<width>(p, width), v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm512_sqrt_pd(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
  friend Vec first(Vec a, Vec b, int64_t n) { return {_mm512_mask_mov_pd(a.v, first8(n), b.v)}; }
  friend double sum(Vec a) { return _mm512_reduce_add_pd(a.v); }
  friend double largest(Vec a) { return _mm512_reduce_max_pd(a.v); }
};

#else

constexpr int kRegisters = 16;

FASTEDIT_INLINE __m256i first8(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)), lane);
}
FASTEDIT_INLINE __m256i first4(int64_t n) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n > 4 ? 4 : n), lane);
}
// AVX2 has no masked access to 16-bit lanes.
FASTEDIT_INLINE __m128i load_first(const void* p, int64_t n) {
  alignas(16) uint16_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n > 8 ? 8 : n) * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
FASTEDIT_INLINE void store_first(void* p, __m128i bits, int64_t n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), bits);
  std::memcpy(p, lanes, static_cast<size_t>(n > 8 ? 8 : n) * sizeof(uint16_t));
}

template <>
struct Vec<float> {
  static constexpr int width = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(touched<8>(p, n), first8(n))}; }
  static Vec load(const BFloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const BFloat16* p, int64_t n) { return widen(load_first(p, n)); }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const Float16* p, int64_t n) { return {_mm256_cvtph_ps(load_first(p, n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(touched<8>(p, n), first8(n), v); }
  void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(BFloat16* p, int64_t n) const { store_first(p, narrow(), n); }
  void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half()); }
  void store(Float16* p, int64_t n) const { store_first(p, half(), n); }
  // past the caches, for aligned planes that nobody reads soon; needs a fence before another thread reads
  void stream(float* p) const { _mm256_stream_ps(touched<width>(p, width), v); }
  void stream(BFloat16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(touched<width>(p, width)), narrow()); }
  void stream(Float16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(touched<width>(p, width)), half()); }

  static Vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
  // Round to nearest, ties to even; a NaN stays one.
  __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  __m128i half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  // max and min return b where a is NaN
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  // relative error 2^-11
  friend Vec rough_inverse_sqrt(Vec a) { return {_mm256_rsqrt_ps(a.v)}; }
  friend Vec rough_inverse(Vec a) { return {_mm256_rcp_ps(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  // the last eight bits as an exponent: 2^(b - 127) for bits b
  friend Vec last_bits_as_exponent(Vec a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
  }
  // b where the lane is below n, a elsewhere
  friend Vec first(Vec a, Vec b, int64_t n) { return {_mm256_blendv_ps(a.v, b.v, _mm256_castsi256_ps(first8(n)))}; }
  // a where x >= bound (or x is NaN), 0 elsewhere
  friend Vec where_from(Vec x, Vec bound, Vec a) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_NLT_UQ), a.v)};
  }
  friend float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  friend float largest(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};

template <>
struct Vec<double> {
  static constexpr int width = 4;
  __m256d v;
  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec set(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const double* p, int64_t n) { return {_mm256_maskload_pd(touched<4>(p, n), first4(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int64_t n) const { _mm256_maskstore_pd(touched<4>(p, n), first4(n), v); }
  void stream(double* p) const { _mm256_stream_pd(touched<width>(p, width), v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm256_sqrt_pd(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
  friend Vec first(Vec a, Vec b, int64_t n) { return {_mm256_blendv_pd(a.v, b.v, _mm256_castsi256_pd(first4(n)))}; }
  friend double sum(Vec a) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  friend double largest(Vec a) {
    const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

#endif

// What sums over T are kept in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// The transpose of a (rows, columns).
template <class A>
FASTEDIT_INLINE void turn(const A* a, int64_t a_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = a[i * a_stride + j];
  }
}

// The transpose of eight rows and columns of float32.
FASTEDIT_INLINE void turn8(const float* a, int64_t a_stride, float* out, int64_t out_stride) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(a + i * a_stride);
  for (int i = 0; i < 4; ++i) {
    pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      quad[4 * i + 2 * j] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + 2 + j], 0x44);
      quad[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + 2 + j], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * out_stride, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31));
  }
}

}  // namespace fastedit::FASTEDIT_ISA
