// CUDA's words for a C++ compiler: a block runs its threads one after another, each on a stack of its own, from one
// barrier to the next. A barrier that some thread never reaches, or that is missing where threads share memory and the
// order of running them is turned around, shows. For tests: slow, one block at a time, one translation unit.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace fastedit::gpu {

struct Index {
  unsigned x;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline Index threadIdx, blockIdx;

// Two bfloat16 in a word, and what device.h does to both at once.
struct __nv_bfloat162 {
  uint16_t x, y;
};
inline float __low2float(__nv_bfloat162 two) {
  const uint32_t bits = static_cast<uint32_t>(two.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __high2float(__nv_bfloat162 two) {
  return __low2float({two.y, two.x});
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](float one, uint16_t one_bits, float other, uint16_t other_bits) {
    return one != one || other > one ? other_bits : one_bits;
  };
  return {larger(__low2float(a), a.x, __low2float(b), b.x), larger(__high2float(a), a.y, __high2float(b), b.y)};
}
// A NaN of a stays one; b has none.
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](float one, uint16_t one_bits, float other, uint16_t other_bits) {
    return other > one ? other_bits : one_bits;
  };
  return {larger(__low2float(a), a.x, __low2float(b), b.x), larger(__high2float(a), a.y, __high2float(b), b.y)};
}

class Emulator {
 public:
  // warps and lanes run in this order
  bool backwards = false;

  // Runs a block of whole warps; false when some threads wait at a barrier that others never reach.
  bool run(int threads, std::function<void()> body) {
    body_ = std::move(body);
    if (static_cast<int>(threads_.size()) != threads) threads_ = std::vector<Thread>(threads);
    for (Thread& thread : threads_) thread.start();
    const auto nth = [&](int i, int of) { return backwards ? of - 1 - i : i; };
    for (bool moved = true; moved;) {
      moved = false;
      // a warp goes as far as it can before another one does
      for (int warp = 0; warp < threads / 32; ++warp) {
        for (bool again = true; again; moved |= again) {
          again = false;
          for (int lane = 0; lane < 32; ++lane) again |= resume(nth(warp, threads / 32) * 32 + nth(lane, 32));
        }
      }
    }
    for (const Thread& thread : threads_) {
      if (!thread.done) return false;
    }
    return true;
  }

  void sync_block() { wait(0, static_cast<int>(threads_.size()), threads_[current_].at_block); }

  // The value of another lane of the warp.
  template <class V>
  V exchange(V value, int lane) {
    Thread& own = threads_[current_];
    const int warp = current_ / 32 * 32;
    // two places in turn: nobody writes the next value while a slow lane still reads this one
    const int place = own.at_warp % 2;
    std::memcpy(&own.value[place], &value, sizeof(value));
    wait(warp, warp + 32, own.at_warp);
    std::memcpy(&value, &threads_[warp + lane].value[place], sizeof(value));
    return value;
  }

 private:
  struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    // barriers reached; and what it waits for, until all of [first, last) are as far
    int at_block, at_warp;
    int first, last;
    const int Thread::* what;
    bool done;
    uint64_t value[2];

    void start() {
      at_block = at_warp = first = last = 0;
      what = &Thread::at_block;
      done = false;
      getcontext(&context);
      context.uc_stack.ss_sp = stack.data();
      context.uc_stack.ss_size = stack.size();
      context.uc_link = nullptr;
      makecontext(&context, &Emulator::enter, 0);
    }
  };

  static void enter();

  void wait(int first, int last, int& reached) {
    Thread& own = threads_[current_];
    ++reached;
    own.first = first;
    own.last = last;
    own.what = &reached == &own.at_block ? &Thread::at_block : &Thread::at_warp;
    if (!ready(own)) swapcontext(&own.context, &scheduler_);
  }

  bool ready(const Thread& own) const {
    for (int i = own.first; i < own.last; ++i) {
      if (threads_[i].*own.what < own.*own.what) return false;
    }
    return true;
  }

  bool resume(int i) {
    if (threads_[i].done || !ready(threads_[i])) return false;
    current_ = i;
    threadIdx.x = static_cast<unsigned>(i);
    swapcontext(&scheduler_, &threads_[i].context);
    return true;
  }

  std::vector<Thread> threads_;
  std::function<void()> body_;
  ucontext_t scheduler_;
  int current_ = 0;
};

inline Emulator emulator;

inline void Emulator::enter() {
  emulator.body_();
  emulator.threads_[emulator.current_].done = true;
  setcontext(&emulator.scheduler_);
}

inline void __syncthreads() {
  emulator.sync_block();
}

// Threads run one after another.
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
inline int atomicMax(int* to, int value) {
  const int before = *to;
  if (value > before) *to = value;
  return before;
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int other) {
  return emulator.exchange(value, static_cast<int>(threadIdx.x % 32) ^ other);
}

}  // namespace fastedit::gpu
