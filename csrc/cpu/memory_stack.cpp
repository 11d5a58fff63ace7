#include "cpu/memory_stack.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tfnas {
namespace {

// AddressSanitizer sees what lies beyond a piece, and all that is not taken, as out of bounds.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
void forbid(const void* data, int64_t bytes) { __asan_poison_memory_region(data, bytes); }
void allow(const void* data, int64_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr int64_t kGap = 0;
void forbid(const void*, int64_t) {}
void allow(const void*, int64_t) {}
#endif

// Straight from the system where possible: blocks of hundreds of megabytes must not leave holes in the heap.
char* get_pages(int64_t bytes) {
#if defined(__linux__)
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  void* data = std::aligned_alloc(64, bytes);
  if (data == nullptr) throw std::bad_alloc();
#endif
  return static_cast<char*>(data);
}

void give_back_pages(char* data, int64_t bytes) {
  allow(data, bytes);
#if defined(__linux__)
  munmap(data, bytes);
#else
  (void)bytes;
  std::free(data);
#endif
}

}  // namespace

MemoryStack::~MemoryStack() {
  for (const Block& block : blocks_) give_back_pages(block.data, block.bytes);
}

void* MemoryStack::take(int64_t wanted) {
  const int64_t bytes = (wanted + kGap + 63) / 64 * 64;
  while (current_ < blocks_.size() && top_ + bytes > blocks_[current_].end()) {
    if (++current_ < blocks_.size()) top_ = blocks_[current_].start;
  }
  if (current_ == blocks_.size()) add_block(bytes);
  void* result = blocks_[current_].data + (top_ - blocks_[current_].start);
  allow(result, wanted);
  top_ += bytes;
  peak_ = std::max(peak_, top_);
  return result;
}

void MemoryStack::release(int64_t mark) {
  top_ = mark;
  for (const Block& block : blocks_)
    if (block.end() > mark)
      forbid(block.data + std::max<int64_t>(0, mark - block.start),
             std::min(block.bytes, block.end() - mark));
  while (current_ > 0 && (current_ == blocks_.size() || blocks_[current_].start > mark)) --current_;
  if (mark == 0 && blocks_.size() > 1) {
    for (const Block& block : blocks_) give_back_pages(block.data, block.bytes);
    blocks_.clear();
    current_ = 0;
    wanted_ = peak_;
  }
}

void MemoryStack::reserve(int64_t bytes) {
  if (blocks_.empty()) wanted_ = std::max(wanted_, bytes);
}

void MemoryStack::add_block(int64_t bytes) {
  constexpr int64_t page = int64_t{1} << 21;  // huge pages
  bytes = (std::max(bytes, std::exchange(wanted_, 0)) + page - 1) / page * page;
  blocks_.reserve(blocks_.size() + 1);
  char* data = get_pages(bytes);
  forbid(data, bytes);
  const int64_t start = blocks_.empty() ? 0 : blocks_.back().end();
  blocks_.push_back({data, start, bytes});
  current_ = blocks_.size() - 1;
  top_ = start;
}

}  // namespace tfnas
