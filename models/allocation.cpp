// SPDX-License-Identifier: Apache-2.0
#include "models/allocation.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>

namespace alambic {
namespace {

enum Place : int { kWorking, kKept, kWhereThereIsRoom };
thread_local int place = kWorking;

// Best fit, or the highest, in one reserved stretch of addresses; neighbours that are free become one. Blocks are few and large, so that maps and
// a search through all free ones cost nothing beside what is done with the memory.
class Heap {
 public:
  Heap() {
    const auto pages = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)), page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    void* const reserved = ::mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return;  // limited address space: everything comes from malloc
    ::madvise(reserved, pages * page, MADV_HUGEPAGE);  // only a wish: neighbouring rows lie in pages of their own, and the processor remembers where few pages are
    base_ = static_cast<char*>(reserved);
    free_[0] = size_ = pages * page;
  }

  bool holds(const void* pointer) const { return base_ != nullptr && pointer >= base_ && pointer < base_ + size_; }

  // nullptr where nothing is large enough.
  void* allocate(std::size_t wanted) {
    const std::size_t bytes = rounded(wanted);
    const std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->second >= bytes && (best == free_.end() || block->second < best->second)) best = block;
    if (best == free_.end()) return nullptr;
    high_ = std::max(high_, best->first + bytes);
    return take(best, best->first, bytes);
  }

  // The highest place below what has ever been used; nullptr where none is large enough. A backward pass frees what was kept from the highest block down: its
  // gradients close up behind each other, and what remains of a block's room joins that of the next.
  void* allocate_in_room(std::size_t wanted) {
    const std::size_t bytes = rounded(wanted);
    const std::lock_guard lock(mutex_);
    for (auto block = free_.end(); block != free_.begin();) {
      --block;
      const std::size_t end = std::min(block->first + block->second, high_);
      if (end >= block->first + bytes) return take(block, end - bytes, bytes);
    }
    return nullptr;
  }

  void release(void* pointer) {
    const std::lock_guard lock(mutex_);
    const auto used = used_.find(static_cast<std::size_t>(static_cast<char*>(pointer) - base_));
    auto block = free_.insert(*used).first;
    used_.erase(used);
    if (const auto next = std::next(block); next != free_.end() && block->first + block->second == next->first) {
      block->second += next->second;
      free_.erase(next);
    }
    if (block == free_.begin()) return;
    const auto previous = std::prev(block);
    if (previous->first + previous->second != block->first) return;
    previous->second += block->second;
    free_.erase(block);
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  static std::size_t rounded(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  void* take(std::map<std::size_t, std::size_t>::iterator block, std::size_t offset, std::size_t bytes) {
    const auto [first, size] = *block;
    if (offset > first) block->second = offset - first;
    else free_.erase(block);
    if (first + size > offset + bytes) free_[offset + bytes] = first + size - offset - bytes;
    used_[offset] = bytes;
    return base_ + offset;
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  std::size_t size_ = 0, high_ = 0;  // high: of what has ever been used
  std::map<std::size_t, std::size_t> free_, used_;  // offset -> bytes
};

class TwoHeaps final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* pointer = nullptr;
    if (place != kWorking && bytes >= kLeast) {
      if (place == kWhereThereIsRoom) pointer = kept_.allocate_in_room(bytes);
      if (place == kWhereThereIsRoom && pointer == nullptr) pointer = working_.allocate_in_room(bytes);
      if (pointer == nullptr) pointer = kept_.allocate(bytes);
    } else if (bytes >= kLarge) {
      pointer = working_.allocate(bytes);
    }
    if (pointer == nullptr) pointer = ordinary_.raw_allocate(bytes);
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  static TwoHeaps& instance() {
    static TwoHeaps* const only = new TwoHeaps;  // never destroyed: tensors of static duration are freed after main()
    return *only;
  }

 private:
  static constexpr std::size_t kLeast = 1 << 10, kLarge = 16 << 10;
  static void release(void* pointer) {
    TwoHeaps& own = instance();
    if (own.kept_.holds(pointer)) own.kept_.release(pointer);
    else if (own.working_.holds(pointer)) own.working_.release(pointer);
    else own.ordinary_.raw_deallocate(pointer);
  }
  c10::Allocator& ordinary_ = *c10::GetDefaultCPUAllocator();
  Heap kept_, working_;
};

}  // namespace

void use_tensor_heaps() {
  ::setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", /*overwrite=*/0);
  c10::SetCPUAllocator(&TwoHeaps::instance(), /*priority=*/1);
}

KeptTensors::KeptTensors(bool active) : before_(place) { place = active ? kKept : kWorking; }
KeptTensors::~KeptTensors() { place = before_; }

TensorsUntilTheOptimiser::TensorsUntilTheOptimiser() : before_(place) { place = kWhereThereIsRoom; }
TensorsUntilTheOptimiser::~TensorsUntilTheOptimiser() { place = before_; }

}  // namespace alambic
