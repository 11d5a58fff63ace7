// What the event timer needs besides CUDA events: a gate that holds a stream back, and a reading of the SM
// clock.
#pragma once

#include <cuda_runtime_api.h>

namespace tfnas::timing {

// Holds back everything queued on a stream after `close` until `open`, so that the time the host takes to
// queue work is not measured. One gate per device, closed at most once at a time.
class Gate {
 public:
  Gate();
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  // Queues the kernel that waits. It gives up after `timeout_ms`, so that work which synchronises inside
  // cannot hang.
  cudaError_t close(cudaStream_t stream, double timeout_ms);
  void open();
  // Whether the last wait ended by its timeout; valid after the stream was synchronised.
  bool timed_out() const;

 private:
  struct Shared {
    int open;
    int timed_out;
  };
  Shared* host_ = nullptr;
  Shared* device_ = nullptr;
};

// Measures the SM clock over `spin_us` microseconds on `stream`, synchronously. Result in MHz through `mhz`.
cudaError_t measure_sm_clock(cudaStream_t stream, double spin_us, double* mhz);

}  // namespace tfnas::timing
