// Types and number formats of the kernels: loads and stores in any storage type, activations and their
// derivatives.
#pragma once

#include "layer_table.cuh"

namespace tfnas::cuda {

__device__ inline float load(const float* p) { return *p; }
__device__ inline double load(const double* p) { return *p; }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

// Stores and returns the value as later readers will see it: statistics are those of the stored tensor.
__device__ inline float store(float* p, float v) { return *p = v; }
__device__ inline double store(double* p, double v) { return *p = v; }
__device__ inline float store(__nv_bfloat16* p, float v) {
  *p = __float2bfloat16(v);
  return __bfloat162float(*p);
}

// The value as a tensor of T holds it.
template <class T>
__device__ inline Acc<T> as_stored(Acc<T> v) {
  T place;
  return store(&place, v);
}

// A group of neighbouring values, in one access.
template <class Group>
__device__ inline Group load_group(const void* p) {
#ifdef TFNAS_EMULATE
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Group))
    throw std::logic_error("a group of values is not aligned");
#endif
  return *static_cast<const Group*>(p);
}

// Four neighbouring values; those at and past `valid` are zero. One wide access where `aligned` (16 or 8
// bytes).
template <class T>
struct Four {
  Acc<T> v[4];
};
__device__ inline void load_aligned(const float* p, float (&v)[4]) {
  const float4 f = load_group<float4>(p);
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
__device__ inline void load_aligned(const double* p, double (&v)[4]) {
  for (int i = 0; i < 4; i++) v[i] = p[i];
}
__device__ inline void load_aligned(const __nv_bfloat16* p, float (&v)[4]) {
  const uint2 u = load_group<uint2>(p);
  v[0] = __uint_as_float(u.x << 16), v[1] = __uint_as_float(u.x & 0xffff0000u);
  v[2] = __uint_as_float(u.y << 16), v[3] = __uint_as_float(u.y & 0xffff0000u);
}
// Whether rows of `columns` values that begin at `first` can be read in aligned groups of four.
template <class T>
__device__ inline bool rows_aligned(const T* first, int columns) {
  return columns % 4 == 0 && reinterpret_cast<uintptr_t>(first) % (4 * sizeof(T)) == 0;
}
template <class T>
__device__ inline Four<T> load4(const T* p, int valid, bool aligned) {
  Four<T> four;
  if (aligned && valid >= 4) {
    load_aligned(p, four.v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) four.v[i] = i < valid ? load(p + i) : Acc<T>(0);
  }
  return four;
}

__device__ inline float sigmoid(float h) { return __fdividef(1.f, 1.f + __expf(-h)); }
__device__ inline double sigmoid(double h) { return 1.0 / (1.0 + exp(-h)); }

template <class A>
__device__ inline A clamp(A v, A low, A high) {
  return v < low ? low : v > high ? high : v;
}

// A run-time switch, the same for every thread: instances for each activation would multiply the compile
// time.
template <class A>
__device__ inline A activate(int act, A h) {
  switch (act) {
    case kRelu:
      return h > A(0) ? h : A(0);
    case kRelu6:
      return clamp(h, A(0), A(6));
    case kSwish:
      return h * sigmoid(h);
    case kHardSwish:
      return h * clamp(h + A(3), A(0), A(6)) / A(6);
    default:
      return h;
  }
}

// Value and derivative; at the kinks the derivative is the one PyTorch takes.
template <class A>
__device__ inline void activate_with_slope(int act, A h, A& value, A& slope) {
  value = h;
  slope = 1;
  switch (act) {
    case kRelu:
      value = h > A(0) ? h : A(0);
      slope = h > A(0) ? A(1) : A(0);
      break;
    case kRelu6:
      value = clamp(h, A(0), A(6));
      slope = h > A(0) && h < A(6) ? A(1) : A(0);
      break;
    case kSwish: {
      const A s = sigmoid(h);
      value = h * s;
      slope = s + value * (A(1) - s);
      break;
    }
    case kHardSwish:
      value = h * clamp(h + A(3), A(0), A(6)) / A(6);
      slope = h <= A(-3) ? A(0) : h >= A(3) ? A(1) : h / A(3) + A(0.5);
      break;
    default:
      break;
  }
}

}  // namespace tfnas::cuda
