// A stack of memory blocks that grows and is kept: fresh pages cost more than the kernels' own traffic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tfnas {

class MemoryStack {
 public:
  MemoryStack() = default;
  ~MemoryStack();
  MemoryStack(const MemoryStack&) = delete;
  MemoryStack& operator=(const MemoryStack&) = delete;

  // 64-byte aligned, contents undefined. Throws std::bad_alloc.
  void* take(int64_t bytes);
  // `release` gives back everything taken since `mark`; at 0 several blocks are joined into one for the next
  // time.
  int64_t mark() const { return top_; }
  void release(int64_t mark);
  // Where nothing was ever taken: the first block has room for `bytes`, so that no block ends in a gap
  // before.
  void reserve(int64_t bytes);
  // The most that was ever taken at once, gaps between blocks included.
  int64_t peak() const { return peak_; }

 private:
  struct Block {
    char* data;
    int64_t start, bytes;  // `start`: of the first byte, counted over all blocks
    int64_t end() const { return start + bytes; }
  };
  void add_block(int64_t bytes);

  std::vector<Block> blocks_;
  size_t current_ = 0;
  int64_t top_ = 0, peak_ = 0;
  int64_t wanted_ = 0;  // size of the next first block
};

}  // namespace tfnas
