#include "cpu/memory.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastedit {
namespace {

constexpr int64_t kPage = int64_t{2} << 20;
constexpr int64_t kLeast = 2 * kPage;        // smaller ones are the C library's business
constexpr int64_t kMost = int64_t{1} << 30;  // bytes kept at a time
constexpr int kWaste = 2;                    // a kept block serves requests of half its size and more

struct Block {
  void* begin;
  int64_t bytes;
};

// Free blocks, the one freed last at the end.
class Kept {
 public:
  static Kept& get() {
    // never destroyed: tensors may outlive the statics
    static Kept* kept = new Kept;
    return *kept;
  }

  Block take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
        if (block->bytes < bytes || block->bytes / kWaste > bytes) continue;
        const Block found = *block;
        free_.erase(std::next(block).base());
        total_ -= found.bytes;
        return found;
      }
    }
    const int64_t whole = (bytes + kPage - 1) / kPage * kPage;
    void* begin = std::aligned_alloc(kPage, whole);
    if (begin == nullptr) {
      release();
      begin = std::aligned_alloc(kPage, whole);
      if (begin == nullptr) throw std::bad_alloc();
    }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // a refusal changes nothing but the speed
    madvise(begin, whole, MADV_HUGEPAGE);
#endif
    return {begin, whole};
  }

  void give(Block block) {
    std::vector<Block> old;
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(block);
      total_ += block.bytes;
      while (total_ > kMost) {
        old.push_back(free_.front());
        total_ -= free_.front().bytes;
        free_.erase(free_.begin());
      }
    }
    for (const Block& one : old) std::free(one.begin);
  }

  int64_t release() {
    std::vector<Block> all;
    {
      const std::lock_guard lock(mutex_);
      all.swap(free_);
      total_ = 0;
    }
    int64_t bytes = 0;
    for (const Block& one : all) {
      std::free(one.begin);
      bytes += one.bytes;
    }
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t total_ = 0;
};

}  // namespace

at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t bytes = static_cast<int64_t>(options.dtype().itemsize());
  for (int64_t size : sizes) bytes *= size;
  if (bytes < kLeast) return at::empty(sizes, options);
  const Block block = Kept::get().take(bytes);
  at::Tensor made = at::from_blob(block.begin, sizes, [block](void*) { Kept::get().give(block); }, options);
  const auto& context = at::globalContext();
  const bool fill = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (fill && at::isFloatingType(made.scalar_type())) {
    made.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return made;
}

int64_t release_kept_memory() {
  const int64_t bytes = Kept::get().release();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  return bytes;
}

bool keep_freed_memory([[maybe_unused]] int64_t bytes) {
#if defined(__GLIBC__)
  // what glibc before 2.35 allows; later ones take any
  constexpr int kLargest = 32 << 20;
  const int limit = static_cast<int>(std::min<int64_t>(bytes, std::numeric_limits<int>::max()));
  if (mallopt(M_TRIM_THRESHOLD, limit) == 0) return false;
  return mallopt(M_MMAP_THRESHOLD, limit) != 0 || mallopt(M_MMAP_THRESHOLD, std::min(limit, kLargest)) != 0;
#else
  return false;
#endif
}

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  m.impl("workspace", [](const at::Tensor& like, at::IntArrayRef size) { return recycled(size, like.options()); });
}

}  // namespace fastedit
