// Runs CUDA kernels on the CPU, to test them where there is no GPU.
//
// Every CUDA thread is a fiber with its own stack; the blocks of a grid run one after another. A fiber runs
// until it waits at a barrier or returns. What this catches:
//   - missing barriers: shared memory starts as NaN, threads can run in forward, reverse and random order,
//   and under
//     ThreadSanitizer every barrier is an ordering point, so that unordered accesses are reported as races;
//   - divergent or partly reached barriers, warp operations that name exited or absent lanes, impossible
//   launches;
//   - out-of-bounds and undefined behaviour, under AddressSanitizer and UBSan.
// What it cannot see: races between blocks (here one follows the other), speed, registers, the real tensor
// cores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using cudaStream_t = void*;

namespace emulator {

enum class Order { kForward, kReverse, kRandom };
void set_order(Order order, unsigned seed = 0);  // in which order the threads of a block take their turns
constexpr int kMaxSharedBytes = 227 * 1024;      // the most that any supported card gives to one block

// Runs `body` once for each thread. Throws std::logic_error, naming block and thread, where a GPU would hang
// or corrupt.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The largest extents of a grid since the last reset: y and z must not grow with what a call's data decide.
dim3 largest_grid();
void reset_largest_grid();

// What the running thread sees.
const uint3& thread_index();
const uint3& block_index();
const dim3& block_dim();
const dim3& grid_dim();
int lane();
void* dynamic_shared();
void poison_once_per_block(void* data, size_t bytes, unsigned long* seen);
void block_barrier(int source_line);
void warp_barrier(unsigned mask);

// Warp-wide exchange: `deposit` offers up to 48 bytes of this lane; between `deposit` and `release_slots`
// every lane may look at what any other lane of `mask` offered.
void deposit(unsigned mask, const void* data, size_t bytes);
const void* slot(int of_lane);
void release_slots(unsigned mask);

template <class T>
T exchange(unsigned mask, T value, int from_lane) {
  deposit(mask, &value, sizeof(T));
  T result;
  if (from_lane < 0 || from_lane >= 32 || !(mask >> from_lane & 1)) {
    std::memset(&result, 0xFF, sizeof(T));  // undefined on a GPU: make it visible
  } else {
    std::memcpy(&result, slot(from_lane), sizeof(T));
  }
  release_slots(mask);
  return result;
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Read-modify-write that ThreadSanitizer knows to be atomic.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Word));
  Word* word = reinterpret_cast<Word*>(address);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bits<Word>(update(bits<T>(old))), false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())
#define __syncthreads() emulator::block_barrier(__LINE__)

inline void __syncwarp(unsigned mask = ~0u) { emulator::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = emulator::lane() & ~(width - 1);
  return emulator::exchange(mask, value, base + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = emulator::lane(), source = lane ^ lane_mask;
  return emulator::exchange(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = emulator::lane(), source = lane + delta;
  return emulator::exchange(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = emulator::lane(), source = lane - delta;
  return emulator::exchange(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
unsigned __ballot_sync(unsigned mask, int predicate);

template <class T>
T atomicAdd(T* address, T value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return emulator::atomic_update(address, [=](T old) { return old > value ? old : value; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator::atomic_update(address, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float value) {  // round to nearest even, NaN stays NaN
  const unsigned u = __float_as_uint(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
