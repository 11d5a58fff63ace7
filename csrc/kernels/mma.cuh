// Matrix products of one warp over operands in shared memory, in the precision that the caller chose.
//
//   kFma     plain multiply-add: fp64, and cards without these tensor-core instructions (below sm_80)
//   kTf32    one tf32 product (about 3 digits)
//   kTf32x3  three tf32 products that together keep fp32's precision
//   kBf16    bf16 operands, fp32 sums
//
// All modes share one shape: a warp owns MT x NT tiles of 16 x 8 results, and the four results of a lane in a
// tile are (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1) with g = lane / 4, t = lane % 4. An operand row is a row
// of results (A) or a column of results (B), with k running along it in 32-bit words: one float, or two bf16
// (even k in the low half); for fp64, one double a word. A step is 8 words, so rows are padded with zeros to
// a multiple of 8 words.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

template <class T, Math M>
struct Operand {
  using Word = unsigned;
  static constexpr int kPerWord = M == Math::kBf16 ? 2 : 1;
};
template <Math M>
struct Operand<double, M> {
  using Word = double;
  static constexpr int kPerWord = 1;
};

// Words of a row of `k` values, padded to whole steps.
template <class T, Math M>
__host__ __device__ constexpr int row_words(int k) {
  return (k + 8 * Operand<T, M>::kPerWord - 1) / (8 * Operand<T, M>::kPerWord) * 8;
}
// Distance of rows in words: 4 modulo 8, so that the 8 rows x 4 words of a fragment fall into 32 different
// banks.
template <class T, Math M>
__host__ __device__ constexpr int row_pitch(int k) {
  return row_words<T, M>(k) + 4;
}

// ---------------------------------------------------------------------------------------------- single
// instructions

__device__ inline unsigned round_to_tf32(float x) {
#ifdef TFNAS_EMULATE
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;  // to nearest, halves away from zero
#elif __CUDA_ARCH__ >= 800
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
#else
  return __float_as_uint(x);  // launchers choose kFma below sm_80
#endif
}

__device__ inline unsigned pack_bf16(float low, float high) {
#ifdef TFNAS_EMULATE
  return unsigned{__float2bfloat16(low).bits} | unsigned{__float2bfloat16(high).bits} << 16;
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
#endif
}

#ifdef TFNAS_EMULATE
// Tensor cores cut off what a float does not hold; they do not round to nearest.
inline float truncate_to_float(double v) {
  const float nearest = static_cast<float>(v);
  return std::fabs(nearest) > std::fabs(v) ? std::nextafter(nearest, 0.f) : nearest;
}

// The documented fragment layout, for any product of two words: A(row, word) lies in lane row % 8 * 4 + word
// % 4.
template <class Product>
inline void emulate_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Product product) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emulator::deposit(~0u, mine, sizeof(mine));
  auto word = [](int lane, int index) { return static_cast<const unsigned*>(emulator::slot(lane))[index]; };
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; i++) {
    double sum = c[i];
    for (int k = 0; k < 8; k++) {
      const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
      sum +=
          product(word(row % 8 * 4 + k % 4, (row >= 8) + 2 * (k >= 4)), word(col * 4 + k % 4, 4 + (k >= 4)));
    }
    c[i] = truncate_to_float(sum);
  }
  emulator::release_slots(~0u);
}
#endif

// c += a b, 16 x 8 x 8, tf32 operands (the unit ignores the low 13 bits).
__device__ inline void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef TFNAS_EMULATE
  emulate_mma(c, a, b, [](unsigned x, unsigned y) {
    return double{__uint_as_float(x & 0xffffe000u)} * __uint_as_float(y & 0xffffe000u);
  });
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // launchers choose kFma below sm_80
#endif
}

// c += a b, 16 x 8 x 16, two bf16 in a word.
__device__ inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef TFNAS_EMULATE
  emulate_mma(c, a, b, [](unsigned x, unsigned y) {
    return double{__uint_as_float(x << 16)} * __uint_as_float(y << 16) +
           double{__uint_as_float(x & 0xffff0000u)} * __uint_as_float(y & 0xffff0000u);
  });
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Four matrices of 8 rows x 4 words: lane l names row l % 8 of matrix l / 8 (16-byte aligned) and receives
// word l % 4 of row l / 4 of each.
__device__ inline void load_matrices(unsigned (&r)[4], const unsigned* row) {
#ifdef TFNAS_EMULATE
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("ldmatrix: row not aligned to 16 bytes");
  emulator::deposit(~0u, &row, sizeof(row));
  for (int i = 0; i < 4; i++) {
    const unsigned* other;
    std::memcpy(&other, emulator::slot(8 * i + emulator::lane() / 4), sizeof(other));
    r[i] = other[emulator::lane() % 4];
  }
  emulator::release_slots(~0u);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// -------------------------------------------------------------------------------------------------------
// fragments

// N words of a lane. kTf32x3 splits every value into a high and a low tf32 part.
template <Math M, int N>
struct Fragment {
  unsigned high[N];
  unsigned low[M == Math::kTf32x3 ? N : 1];
  __device__ void set(int i, unsigned word) {
    if constexpr (M == Math::kTf32x3) {
      high[i] =
          (word + 0x1000u) & 0xffffe000u;  // rounding by integers: a third of the instructions of two cvt.rna
      low[i] = __float_as_uint(__uint_as_float(word) - __uint_as_float(high[i])) + 0x1000u;
    } else {
      high[i] = word;
    }
  }
};

template <Math M>
__device__ inline void multiply(float (&c)[4], const Fragment<M, 4>& a, const Fragment<M, 2>& b) {
  if constexpr (M == Math::kBf16) {
    mma_bf16(c, a.high, b.high);
  } else if constexpr (M == Math::kTf32x3) {
    // Small terms first, and added to `c` outside: the unit truncates, which in a long sum drifts one way.
    float part[4] = {};
    mma_tf32(part, a.low, b.high);
    mma_tf32(part, a.high, b.low);
    mma_tf32(part, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] += part[i];
  } else {
    mma_tf32(c, a.high, b.high);
  }
}

// Writes four neighbouring values of an operand row, rounded once here and not at every fragment.
template <class T, Math M>
__device__ inline void put4(typename Operand<T, M>::Word* row, int k, const Acc<T> (&v)[4]) {
  if constexpr (M == Math::kBf16) {
    row[k / 2] = pack_bf16(v[0], v[1]);
    row[k / 2 + 1] = pack_bf16(v[2], v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(Acc<T>) == 8) {
        row[k + i] = v[i];
      } else {
        row[k + i] = M == Math::kTf32 ? round_to_tf32(v[i]) : __float_as_uint(v[i]);
      }
    }
  }
}

// Writes one operand word from the one or two values that it holds.
template <class T, Math M>
__device__ inline void put_word(typename Operand<T, M>::Word* word,
                                const Acc<T> (&v)[Operand<T, M>::kPerWord]) {
  if constexpr (M == Math::kBf16) {
    *word = pack_bf16(v[0], v[1]);
  } else if constexpr (sizeof(Acc<T>) == 8) {
    *word = v[0];
  } else {
    *word = M == Math::kTf32 ? round_to_tf32(v[0]) : __float_as_uint(v[0]);
  }
}

__device__ inline float word_value(unsigned word) { return __uint_as_float(word); }
__device__ inline double word_value(double word) { return word; }

// sum[MT][NT] += A B over `words` words of k. `a`: first row of the warp's A tile, `b`: first row of its B
// tile; both k-contiguous with pitches as above. Every lane of the warp must call it. Tiles past `rows_a`
// rows are left out.
template <class T, Math M, int MT, int NT>
__device__ inline void warp_product(Acc<T> (&sum)[MT][NT][4], const typename Operand<T, M>::Word* a,
                                    int pitch_a, const typename Operand<T, M>::Word* b, int pitch_b,
                                    int words) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (M == Math::kFma) {
    for (int k = 0; k < words; k++) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            sum[i][j][e] += word_value(a[(16 * i + g + e / 2 * 8) * pitch_a + k]) *
                            word_value(b[(8 * j + 2 * t + e % 2) * pitch_b + k]);
          }
        }
      }
    }
  } else {
    static_assert(NT % 2 == 0, "one load serves two tiles of B");
    const unsigned* lane_a = a + (lane % 16) * pitch_a + lane / 16 * 4;
    const unsigned* lane_b = b + (lane / 16 * 8 + lane % 8) * pitch_b + lane / 8 % 2 * 4;
#pragma unroll 2
    for (int k = 0; k < words; k += 8) {
      Fragment<M, 4> fa[MT];
#pragma unroll
      for (int i = 0; i < MT; i++) {
        unsigned r[4];
        load_matrices(r, lane_a + 16 * i * pitch_a + k);
#pragma unroll
        for (int e = 0; e < 4; e++) fa[i].set(e, r[e]);
      }
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        unsigned r[4];
        load_matrices(r, lane_b + 8 * j * pitch_b + k);
        Fragment<M, 2> fb[2];
#pragma unroll
        for (int e = 0; e < 4; e++) fb[e / 2].set(e % 2, r[e]);
#pragma unroll
        for (int i = 0; i < MT; i++) {
          multiply<M>(sum[i][j], fa[i], fb[0]);
          multiply<M>(sum[i][j + 1], fa[i], fb[1]);
        }
      }
    }
  }
}

// How products read operands that lie across (k is not the contiguous index): bf16 values are exact in tf32.
template <Math M>
inline constexpr Math kAcross = M == Math::kBf16 ? Math::kTf32 : M;

// A value of such an operand as Fragment::set takes it.
template <Math M>
__device__ inline unsigned across_word(float v) {
  return M == Math::kTf32x3 ? __float_as_uint(v) : round_to_tf32(v);
}

// The same product with operands read one value at a time through a(row, k) and b(column, k). `M` must not be
// kBf16, see kAcross.
template <class A, Math M, int MT, int NT, class ReadA, class ReadB>
__device__ inline void warp_product_across(A (&sum)[MT][NT][4], ReadA a, ReadB b, int depth) {
  static_assert(M != Math::kBf16);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (M == Math::kFma) {
    for (int k = 0; k < depth; k++) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++)
            sum[i][j][e] += a(16 * i + g + e / 2 * 8, k) * b(8 * j + 2 * t + e % 2, k);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < depth; k += 8) {
      Fragment<M, 4> fa[MT];
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float v = a(16 * i + g + e % 2 * 8, k + t + e / 2 * 4);
          fa[i].set(e, across_word<M>(v));
        }
      }
#pragma unroll
      for (int j = 0; j < NT; j++) {
        Fragment<M, 2> fb;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float v = b(8 * j + g, k + t + e * 4);
          fb.set(e, across_word<M>(v));
        }
#pragma unroll
        for (int i = 0; i < MT; i++) multiply<M>(sum[i][j], fa[i], fb);
      }
    }
  }
}

}  // namespace tfnas::cuda
