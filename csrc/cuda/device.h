// What the launchers need of the device: the current stream under a device guard, limits, and the check after
// a launch. Built with TFNAS_EMULATE they run the same launchers on CPU tensors.
#pragma once

#include <c10/core/Device.h>

#include "kernels/layer.h"

#ifndef TFNAS_EMULATE
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace tfnas::cuda {

#ifdef TFNAS_EMULATE
#define TFNAS_DEVICE_KEY CPU
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device) {}
  cudaStream_t stream() const { return nullptr; }
  DeviceLimits limits() const { return {emulator::kMaxSharedBytes, 2}; }
  bool has_tensor_cores() const { return true; }
  void check_launches() const {}
};
constexpr auto kDeviceType = c10::DeviceType::CPU;
#else
#define TFNAS_DEVICE_KEY CUDA
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device device) : guard_(checked(device)) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }
  DeviceLimits limits() const {
    return {static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
            attribute(cudaDevAttrMultiProcessorCount)};
  }
  bool has_tensor_cores() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }
  void check_launches() const { C10_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  // A call with one tensor on a GPU comes here with the others anywhere.
  static c10::Device checked(c10::Device device) {
    TORCH_CHECK_VALUE(device.is_cuda(), "the first tensor must be on a CUDA device, as others are, got ",
                      device);
    return device;
  }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, guard_.current_device().index()));
    return value;
  }
  c10::cuda::CUDAGuard guard_;
};
constexpr auto kDeviceType = c10::DeviceType::CUDA;
#endif

}  // namespace tfnas::cuda
