#include "cpu/memory_stack.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tfnas {

MemoryStack::~MemoryStack() {
  for (const Block& block : blocks_) std::free(block.data);
}

void* MemoryStack::take(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  while (current_ < blocks_.size() && top_ + bytes > blocks_[current_].end()) {
    if (++current_ < blocks_.size()) top_ = blocks_[current_].start;
  }
  if (current_ == blocks_.size()) add_block(bytes);
  void* result = blocks_[current_].data + (top_ - blocks_[current_].start);
  top_ += bytes;
  peak_ = std::max(peak_, top_);
  return result;
}

void MemoryStack::release(int64_t mark) {
  top_ = mark;
  while (current_ > 0 && (current_ == blocks_.size() || blocks_[current_].start > mark)) --current_;
  if (mark == 0 && blocks_.size() > 1) {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    current_ = 0;
    add_block(peak_);
    peak_ = 0;
  }
}

void MemoryStack::add_block(int64_t bytes) {
  constexpr int64_t page = int64_t{1} << 21;  // huge pages
  bytes = (bytes + page - 1) / page * page;
  blocks_.reserve(blocks_.size() + 1);
  char* data = static_cast<char*>(std::aligned_alloc(page, bytes));
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  const int64_t start = blocks_.empty() ? 0 : blocks_.back().end();
  blocks_.push_back({data, start, bytes});
  current_ = blocks_.size() - 1;
  top_ = start;
}

}  // namespace tfnas
