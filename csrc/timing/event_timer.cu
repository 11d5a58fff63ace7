// Kernels of the event timer. Plain CUDA: no torch header, so that it compiles alone and fast.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "timing/event_timer.h"

namespace tfnas::timing {
namespace {

__device__ unsigned long long global_nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// One thread spins on a flag in host memory. Volatile reads go past the caches; the host writes the flag
// once.
__global__ void wait_for_host(const volatile int* open, volatile int* timed_out,
                              unsigned long long timeout_ns) {
  const unsigned long long start = global_nanoseconds();
  while (*open == 0) {
    if (global_nanoseconds() - start > timeout_ns) {
      *timed_out = 1;
      __threadfence_system();
      return;
    }
  }
}

// SM cycles over a stretch of wall time. globaltimer ticks at about 1 MHz on some parts: the stretch must be
// longer.
__global__ void count_cycles(unsigned long long spin_ns, unsigned long long* result) {
  unsigned long long first = global_nanoseconds();
  while (global_nanoseconds() == first) {
  }
  const unsigned long long start = global_nanoseconds();
  const long long cycles = clock64();
  unsigned long long now = start;
  while (now - start < spin_ns) now = global_nanoseconds();
  result[0] = static_cast<unsigned long long>(clock64() - cycles);
  result[1] = now - start;
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

Gate::Gate() {
  check(cudaHostAlloc(reinterpret_cast<void**>(&host_), sizeof(Shared), cudaHostAllocMapped),
        "cudaHostAlloc");
  const cudaError_t status = cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_), host_, 0);
  if (status != cudaSuccess) {
    cudaFreeHost(host_);
    check(status, "cudaHostGetDevicePointer");
  }
  *host_ = Shared{1, 0};
}

Gate::~Gate() { cudaFreeHost(host_); }

cudaError_t Gate::close(cudaStream_t stream, double timeout_ms) {
  *static_cast<volatile int*>(&host_->timed_out) = 0;
  *static_cast<volatile int*>(&host_->open) = 0;
  wait_for_host<<<1, 1, 0, stream>>>(&device_->open, &device_->timed_out,
                                     static_cast<unsigned long long>(timeout_ms * 1e6));
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) open();
  return status;
}

void Gate::open() { *static_cast<volatile int*>(&host_->open) = 1; }

bool Gate::timed_out() const { return *static_cast<volatile int*>(&host_->timed_out) != 0; }

cudaError_t measure_sm_clock(cudaStream_t stream, double spin_us, double* mhz) {
  unsigned long long* result = nullptr;
  cudaError_t status =
      cudaHostAlloc(reinterpret_cast<void**>(&result), 2 * sizeof(*result), cudaHostAllocMapped);
  if (status != cudaSuccess) return status;
  unsigned long long* device = nullptr;
  status = cudaHostGetDevicePointer(reinterpret_cast<void**>(&device), result, 0);
  if (status == cudaSuccess) {
    count_cycles<<<1, 1, 0, stream>>>(static_cast<unsigned long long>(spin_us * 1e3), device);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status == cudaSuccess) *mhz = 1e3 * static_cast<double>(result[0]) / static_cast<double>(result[1]);
  cudaFreeHost(result);
  return status;
}

}  // namespace tfnas::timing
