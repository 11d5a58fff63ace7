#include "cpu/mbinvres.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/capability.h"

namespace tfnas {

namespace generic {
extern const LayerKernels<float> layer_kernels;
extern const LayerKernels<double> layer_kernels_double;
}  // namespace generic
namespace avx2 {
extern const LayerKernels<float> layer_kernels;
}
namespace avx512 {
extern const LayerKernels<float> layer_kernels;
}

const LayerKernels<float>& float_kernels() { return TFNAS_PICK_ISA(layer_kernels); }
const LayerKernels<double>& double_kernels() { return generic::layer_kernels_double; }

Design choose_design(int64_t pixels) {
  // Where a group of channels of the whole batch no longer fits a core's L2, strips win (measured).
  return pixels <= 4000 ? Design::channels : Design::strips;
}

namespace {

// Blocks in order of use; `used_before` is the offset at which a block starts, so that a mark is one number.
class ScratchStack {
 public:
  ~ScratchStack() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  void* take(int64_t bytes) {
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

  int64_t mark() const { return top_; }

  void release(int64_t mark) {
    top_ = mark;
    while (current_ > 0 && (current_ == blocks_.size() || blocks_[current_].start > mark)) --current_;
    if (mark == 0 && blocks_.size() > 1) {  // next time in one piece
      for (const Block& block : blocks_) std::free(block.data);
      blocks_.clear();
      current_ = 0;
      add_block(peak_);
    }
  }

 private:
  struct Block {
    char* data;
    int64_t start, bytes;
    int64_t end() const { return start + bytes; }
  };

  void add_block(int64_t bytes) {
    constexpr int64_t page = int64_t{1} << 21;
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

  std::vector<Block> blocks_;
  size_t current_ = 0;
  int64_t top_ = 0, peak_ = 0;
};

ScratchStack& scratch() {
  static thread_local ScratchStack stack;
  return stack;
}

}  // namespace

void* scratch_take(int64_t bytes) { return scratch().take(bytes); }
int64_t scratch_mark() { return scratch().mark(); }
void scratch_release(int64_t mark) { scratch().release(mark); }

}  // namespace tfnas
