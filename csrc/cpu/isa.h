// Which instruction set the kernels run with: compiled for AVX2 and for AVX-512, chosen when they are called.
#pragma once

#include <cstdint>

namespace fastedit {

enum class Isa { none, avx2, avx512 };

// The best set this processor has, among those that the kernels are compiled for.
Isa best_isa();

// Who made this processor: "intel", "amd" or "other".
const char* processor_vendor();

// The set in use: the best one, unless the tests chose a smaller one.
Isa current_isa();
void use_isa(Isa isa);

// 16-bit floats as stored; the kernels convert them and never compute with them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls function<types...> in the namespace of the instruction set in use: FASTEDIT_SIMD(dots, (T, A), arguments...).
#define FASTEDIT_ANGLE(...) <__VA_ARGS__>
#define FASTEDIT_SIMD(function, types, ...)                             \
  (::fastedit::current_isa() == ::fastedit::Isa::avx512                 \
       ? ::fastedit::avx512::function FASTEDIT_ANGLE types(__VA_ARGS__) \
       : ::fastedit::avx2::function FASTEDIT_ANGLE types(__VA_ARGS__))

}  // namespace fastedit
