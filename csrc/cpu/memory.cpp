#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "check.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastedit {
namespace {

constexpr int64_t kHuge = int64_t{2} << 20;    // a huge page, and what blocks are aligned to
constexpr int64_t kGrain = int64_t{64} << 10;  // sizes are multiples of it
constexpr int64_t kLeast = int64_t{1} << 19;   // smaller ones are the C library's business
constexpr int kWaste = 2;                      // a kept block serves requests of half its size and more

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

  void limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    most_ = bytes;
  }

  // The smallest free block that is large enough, or a new one.
  Block take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        if (block->bytes < bytes || block->bytes / kWaste > bytes) continue;
        if (best == free_.end() || block->bytes <= best->bytes) best = block;
      }
      if (best != free_.end()) {
        const Block found = *best;
        free_.erase(best);
        total_ -= found.bytes;
        return found;
      }
    }
    const int64_t whole = (bytes + kGrain - 1) / kGrain * kGrain;
    void* begin = fresh(whole);
    if (begin == nullptr) {
      release();
      begin = fresh(whole);
      if (begin == nullptr) throw std::bad_alloc();
    }
    return {begin, whole};
  }

  void give(Block block) {
    std::vector<Block> old;
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(block);
      total_ += block.bytes;
      while (total_ > most_) {
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
  static void* fresh(int64_t bytes) {
    void* begin = nullptr;
    const int64_t alignment = bytes < kHuge ? 64 : kHuge;
    if (posix_memalign(&begin, alignment, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // a refusal changes nothing but the speed
    if (bytes >= kHuge) madvise(begin, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
    return begin;
  }

  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t total_ = 0;
  int64_t most_ = int64_t{1} << 30;
};

// torch's allocator on the CPU with large blocks from those that were freed. A C library gives blocks of some MiB back
// to the system, or cuts small ones out of them; either way the next large one is new, and every page of it a fault.
class Recycler final : public at::Allocator {
 public:
  explicit Recycler(at::Allocator* small) : small_(small) {}

  at::DataPtr allocate(size_t bytes) override {
    if (static_cast<int64_t>(bytes) < kLeast) return small_->allocate(bytes);
    const Block block = Kept::get().take(static_cast<int64_t>(bytes));
    {
      const std::lock_guard lock(mutex_);
      given_[block.begin] = block.bytes;
    }
    // data and context are one, which allocation without an owner (oneDNN's) relies on
    return {block.begin, block.begin, &give_back, at::Device(at::DeviceType::CPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  static std::atomic<Recycler*> installed;

 private:
  // Of either kind: small blocks without an owner come here as well.
  static void give_back(void* begin) {
    if (begin == nullptr) return;
    Block block{begin, 0};
    Recycler* self = installed.load(std::memory_order_acquire);
    {
      const std::lock_guard lock(self->mutex_);
      const auto found = self->given_.find(begin);
      if (found != self->given_.end()) {
        block.bytes = found->second;
        self->given_.erase(found);
      }
    }
    if (block.bytes > 0) {
      Kept::get().give(block);
    } else {
      self->small_->raw_deleter()(begin);
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> given_;
  at::Allocator* small_;
};

// never destroyed, and never uninstalled: what it gave out comes back to it
std::atomic<Recycler*> Recycler::installed{nullptr};

}  // namespace

at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t bytes = static_cast<int64_t>(options.dtype().itemsize());
  bool fits = true;
  for (int64_t size : sizes) {
    FASTEDIT_CHECK(size >= 0, "workspace", "sizes are not negative", "size=", shown(sizes));
    fits = !c10::mul_overflows(bytes, size, &bytes) && fits;
  }
  // a size that cannot be is torch's to refuse
  if (!fits || bytes < kLeast) return at::empty(sizes, options);
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

void keep_freed_memory(int64_t bytes) {
  Kept::get().limit(bytes);
  static std::once_flag once;
  std::call_once(once, [] {
    Recycler* recycler = new Recycler(at::getCPUAllocator());
    Recycler::installed.store(recycler, std::memory_order_release);
    c10::SetCPUAllocator(recycler, 1);
  });
}

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  m.impl("workspace", [](const at::Tensor& like, at::IntArrayRef size) { return recycled(size, like.options()); });
}

}  // namespace fastedit
