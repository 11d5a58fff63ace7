// torch.ops.tfnas.timing_*: the event timer's gate and clock on torch's current stream. Compiled with CUDA
// only.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>

#include "timing/event_timer.h"

namespace tfnas::timing {
namespace {

Gate& gate_of(int64_t device) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<Gate>> gates;
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Gate>& gate = gates[device];
  if (!gate) gate = std::make_unique<Gate>();
  return *gate;
}

c10::cuda::CUDAGuard guard_of(int64_t device) {
  TORCH_CHECK(device >= 0, "timing: expected a CUDA device index >= 0, got ", device);
  return c10::cuda::CUDAGuard(static_cast<c10::DeviceIndex>(device));
}

void close_gate(int64_t device, double timeout_ms) {
  const c10::cuda::CUDAGuard guard = guard_of(device);
  TORCH_CHECK(timeout_ms > 0, "timing_close_gate: expected timeout_ms > 0, got ", timeout_ms);
  C10_CUDA_CHECK(gate_of(device).close(c10::cuda::getCurrentCUDAStream(), timeout_ms));
}

void open_gate(int64_t device) {
  const c10::cuda::CUDAGuard guard = guard_of(device);
  gate_of(device).open();
}

bool gate_timed_out(int64_t device) {
  const c10::cuda::CUDAGuard guard = guard_of(device);
  return gate_of(device).timed_out();
}

double sm_clock_mhz(int64_t device, double spin_us) {
  const c10::cuda::CUDAGuard guard = guard_of(device);
  TORCH_CHECK(spin_us > 0, "timing_sm_clock_mhz: expected spin_us > 0, got ", spin_us);
  double mhz = 0;
  C10_CUDA_CHECK(measure_sm_clock(c10::cuda::getCurrentCUDAStream(), spin_us, &mhz));
  return mhz;
}

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  m.def("timing_close_gate(int device, float timeout_ms) -> ()", close_gate);
  m.def("timing_open_gate(int device) -> ()", open_gate);
  m.def("timing_gate_timed_out(int device) -> bool", gate_timed_out);
  m.def("timing_sm_clock_mhz(int device, float spin_us) -> float", sm_clock_mhz);
}

}  // namespace
}  // namespace tfnas::timing
