// What a forward through the body leaves for its backward.
#pragma once

#include "engine/supernet_engine.h"

namespace tfnas {

// Stacks of memory that wait for the next forward.
struct TapePool {
  std::mutex mutex;
  std::vector<std::unique_ptr<MemoryStack>> free;

  std::unique_ptr<MemoryStack> get() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (free.empty()) return std::make_unique<MemoryStack>();
    std::unique_ptr<MemoryStack> stack = std::move(free.back());
    free.pop_back();
    return stack;
  }
  void put(std::unique_ptr<MemoryStack> stack) {
    stack->release(0);
    const std::lock_guard<std::mutex> lock(mutex);
    free.push_back(std::move(stack));
  }
  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t total = 0;
    for (const std::unique_ptr<MemoryStack>& stack : free) total += stack->peak();
    return total;
  }
};

// One layer of one pass; pointers are to the activations' type.
struct LayerTape {
  const void* input = nullptr;
  void* mixed = nullptr;   // the operations' weighted sum
  void* output = nullptr;  // that, gated (skip-out); else the same memory
  void* saved = nullptr;
  std::vector<int64_t> candidates;  // those that run, without the identity
  std::vector<double> mix;          // their weights; empty for a path
  double direct = 0;                // weight of the input itself: identity and residuals
  int64_t height = 0, width = 0;
  int64_t end = 0;  // mark of the tape's memory behind what its backward reads
};

struct BodyTape {
  std::vector<LayerTape> layers;
  std::vector<const void*> stage_outputs;
};

struct Tape::Impl {
  std::unique_ptr<MemoryStack> memory;
  at::Tensor x;
  std::vector<BodyTape> bodies;  // one per path, or one for the mixture
  std::vector<std::vector<int64_t>> choices;
  std::vector<std::vector<double>> u, v;
  bool used = false;
};

}  // namespace tfnas
