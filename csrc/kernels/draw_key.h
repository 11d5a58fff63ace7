// Which numbers of the sampler's stream a launch draws: given by the host, or read from device memory.
#pragma once

#include <cstdint>

#include "philox.cuh"

namespace tfnas {

// Where `clock` (seed, step) and `tau_at` point to device memory they hold instead
// of the values: a captured launch is replayed for other steps.
struct DrawKey {
  uint64_t seed, step;
  double tau;
  const int64_t* clock;
  const double* tau_at;
  TFNAS_HD DrawKey resolved() const {
    DrawKey key = *this;
    if (clock != nullptr)
      key.seed = static_cast<uint64_t>(clock[0]), key.step = static_cast<uint64_t>(clock[1]);
    if (tau_at != nullptr) key.tau = *tau_at;
    return key;
  }
};

}  // namespace tfnas
