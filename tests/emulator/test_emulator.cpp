// The emulator's own tests. Without an argument: correct kernels must pass in every thread order. With the
// name of a planted bug: the bug runs, and the program must end with an error (from the emulator, or from the
// sanitizer that the build has), so the harness expects this run to fail.
#include <cstdio>
#include <map>
#include <vector>

#include "compat.cuh"

namespace {

constexpr int kThreads = 96;

// Rotates an array through shared memory and sums it over warps: barriers, shuffles, ballots and atomics.
__global__ void rotate_and_sum(const float* in, float* out, float* sum, unsigned* ballots) {
  TFNAS_DYN_SHARED(float, tile);
  TFNAS_SHARED(float, warp_sum, [kThreads / 32]);
  const int t = threadIdx.x;
  tile[t] = in[blockIdx.x * kThreads + t];
  __syncthreads();
  const float value = tile[(t + 1) % kThreads];
  out[blockIdx.x * kThreads + t] = value;
  float s = value;
  for (int offset = 16; offset > 0; offset /= 2) s += __shfl_xor_sync(~0u, s, offset);
  if (t % 32 == 0) warp_sum[t / 32] = s;
  ballots[blockIdx.x * kThreads + t] = __ballot_sync(~0u, t % 3 == 0);
  __syncthreads();
  if (t == 0) atomicAdd(sum, warp_sum[0] + warp_sum[1] + warp_sum[2]);
}

bool correct_kernel_passes(emulator::Order order) {
  emulator::set_order(order, 7);
  constexpr int kBlocks = 3, kCount = kBlocks * kThreads;
  std::vector<float> in(kCount), out(kCount, 0.f);
  std::vector<unsigned> ballots(kCount);
  float sum = 0.f, expected = 0.f;
  for (int i = 0; i < kCount; i++) expected += in[i] = static_cast<float>(i % 17 - 5);
  const float* in_data = in.data();
  float *out_data = out.data(), *sum_data = &sum;
  unsigned* ballot_data = ballots.data();
  TFNAS_LAUNCH((rotate_and_sum), dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float), 0, in_data,
               out_data, sum_data, ballot_data);
  bool good = sum == expected;
  for (int i = 0; i < kCount; i++) {
    const int block = i / kThreads, t = i % kThreads;
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; lane++) ballot |= unsigned{(t / 32 * 32 + lane) % 3 == 0} << lane;
    good &= out[i] == in[block * kThreads + (t + 1) % kThreads] && ballots[i] == ballot;
  }
  return good;
}

__global__ void missing_barrier(float* out) {
  TFNAS_DYN_SHARED(float, tile);
  tile[threadIdx.x] = 1.f;
  out[threadIdx.x] = tile[(threadIdx.x + 1) % kThreads];
}
__global__ void write_past_end(float* out) {
  TFNAS_DYN_SHARED(float, tile);
  if (threadIdx.x == 0) tile[0] = 1.f;
  tile[threadIdx.x + 1] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void barrier_after_return(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 0.f;
}
__global__ void divergent_barriers(float* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0.f;
}
__global__ void exited_lane(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}
__global__ void warp_against_block(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
  } else {
    __syncthreads();
  }
}
__global__ void unwritten_shared(float* out) {
  TFNAS_SHARED(float, tile, [kThreads]);
  if (threadIdx.x != 9) tile[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void fine(float* out) { out[threadIdx.x] = 0.f; }

void require_finite(const std::vector<float>& out) {
  for (float value : out) {
    if (!std::isfinite(value)) throw std::logic_error("a value that nobody wrote was used");
  }
}

template <class Kernel>
void plant(Kernel kernel, int threads = kThreads, size_t shared_bytes = kThreads * sizeof(float)) {
  std::vector<float> out(2048, 0.f);
  for (auto order : {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kRandom}) {
    emulator::set_order(order, 7);
    float* data = out.data();
    emulator::launch(dim3(1), dim3(threads), shared_bytes, [=] { kernel(data); });
    require_finite(out);
  }
}

const std::map<std::string, std::function<void()>> kPlanted = {
    {"missing_barrier", [] { plant(missing_barrier); }},
    {"write_past_end", [] { plant(write_past_end); }},  // AddressSanitizer only
    {"barrier_after_return", [] { plant(barrier_after_return); }},
    {"divergent_barriers", [] { plant(divergent_barriers); }},
    {"exited_lane", [] { plant(exited_lane); }},
    {"warp_against_block", [] { plant(warp_against_block, 32); }},
    {"unwritten_shared", [] { plant(unwritten_shared); }},
    {"too_many_threads", [] { plant(fine, 1025); }},
    {"too_much_shared", [] { plant(fine, 32, emulator::kMaxSharedBytes + 1); }},
    {"race_hidden_by_order",  // reverse order alone gives the right values: only ThreadSanitizer sees it
     [] {
       std::vector<float> out(kThreads);
       emulator::set_order(emulator::Order::kReverse);
       float* data = out.data();
       emulator::launch(dim3(1), dim3(kThreads - 1), kThreads * sizeof(float), [=] {
         TFNAS_DYN_SHARED(float, tile);
         tile[threadIdx.x] = 1.f;
         data[threadIdx.x] = threadIdx.x + 2 < kThreads ? tile[threadIdx.x + 1] : 0.f;
       });
       require_finite(out);
     }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) {
    try {
      kPlanted.at(argv[1])();
    } catch (const std::exception& e) {
      std::printf("rejected: %s\n", e.what());
      return 1;
    }
    std::printf("%s was accepted\n", argv[1]);
    return 0;
  }
  bool good = true;
  for (auto order : {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kRandom}) {
    good &= correct_kernel_passes(order);
  }
  std::puts(good ? "PASS" : "FAIL");
  return good ? 0 : 1;
}
