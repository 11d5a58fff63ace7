// torch's thread pool for the torch-free kernels.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/mbinvres.h"

namespace tfnas {

inline Threads torch_threads() {
  return {at::get_num_threads(), [](int count, void (*body)(void*, int), void* arg) {
            at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(arg, static_cast<int>(i));
            });
          }};
}

}  // namespace tfnas
