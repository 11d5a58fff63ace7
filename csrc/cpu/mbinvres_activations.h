// Activations and their derivatives on vectors, and the switch from a run-time activation to a compile-time
// one.
#pragma once

#include "cpu/mbinvres.h"
#include "cpu/mbinvres_simd.h"

namespace tfnas::TFNAS_ISA {

template <Act A>
struct ActTag {
  static constexpr Act value = A;
};

template <class F>
TFNAS_INLINE void with_act(Act act, F&& f) {
  switch (act) {
    case Act::relu:
      return f(ActTag<Act::relu>{});
    case Act::relu6:
      return f(ActTag<Act::relu6>{});
    case Act::swish:
      return f(ActTag<Act::swish>{});
    case Act::hard_swish:
      return f(ActTag<Act::hard_swish>{});
    case Act::identity:
      return f(ActTag<Act::identity>{});
  }
}

// act(h). T is the scalar type: float or double.
template <class T, Act A, class V>
TFNAS_INLINE V activate(V h) {
  if constexpr (A == Act::relu) {
    return max(splat(T(0)), h);
  } else if constexpr (A == Act::relu6) {
    return min(splat(T(6)), max(splat(T(0)), h));
  } else if constexpr (A == Act::swish) {
    return mul(h, sigmoid(h));
  } else if constexpr (A == Act::hard_swish) {
    const V gate = min(splat(T(1)), max(splat(T(0)), fma(h, splat(T(1) / T(6)), splat(T(0.5)))));
    return mul(h, gate);
  } else {
    return h;
  }
}

// a = act(h), d = act'(h); at a kink the derivative is PyTorch's (0 for relu and relu6).
template <class T, Act A, class V>
TFNAS_INLINE void activate_with_derivative(V h, V& a, V& d) {
  if constexpr (A == Act::relu) {
    a = max(splat(T(0)), h);
    d = above(h, splat(T(0)));
  } else if constexpr (A == Act::relu6) {
    a = min(splat(T(6)), max(splat(T(0)), h));
    d = mul(above(h, splat(T(0))), above(splat(T(6)), h));
  } else if constexpr (A == Act::swish) {
    const V s = sigmoid(h);
    a = mul(h, s);
    d = fma(a, sub(splat(T(1)), s), s);
  } else if constexpr (A == Act::hard_swish) {
    const V gate = min(splat(T(1)), max(splat(T(0)), fma(h, splat(T(1) / T(6)), splat(T(0.5)))));
    a = mul(h, gate);
    // The gate, and h / 6 where the gate is between its bounds.
    const V inside = mul(above(h, splat(T(-3))), above(splat(T(3)), h));
    d = fma(mul(inside, h), splat(T(1) / T(6)), gate);
  } else {
    a = h;
    d = splat(T(1));
  }
}

}  // namespace tfnas::TFNAS_ISA
