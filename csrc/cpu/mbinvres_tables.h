// The kernels' entry points for one element, as tables.
#pragma once

#include "cpu/mbinvres_backward_layer.h"
#include "cpu/mbinvres_vector.h"

namespace tfnas::TFNAS_ISA {

template <class E>
int64_t saved_bytes(const Layer<Compute<E>>& layer) {
  Scratch scratch;
  LayerPlan<E>& plan = *scratch.take<LayerPlan<E>>(1);
  make_plan<E>(layer, nullptr, plan);
  return plan.saved;
}

template <class E>
void forward(const Layer<Compute<E>>& layer, const E* x, E* out, void* saved,
             const BatchStatistics<Compute<E>>& statistics, const Threads& threads) {
  run_forward(layer, x, out, saved, statistics, true, threads);
}

template <class E>
void backward(const Layer<Compute<E>>& layer, const E* x, const void* saved, const E* dout, E* dx,
              Compute<E>* dmix, const CandidateGradient<Compute<E>>* gradients, const Threads& threads) {
  run_backward(layer, x, saved, dout, dx, dmix, gradients, threads);
}

template <class E>
void inference(const Layer<Compute<E>>& layer, const E* x, E* out, const Threads& threads) {
  Scratch scratch;
  Layer<Compute<E>> strips = layer;
  strips.design = Design::strips;
  void* saved = scratch.take<char>(saved_bytes<E>(strips));
  run_forward(strips, x, out, saved, BatchStatistics<Compute<E>>{}, false, threads);
}

template <class E>
constexpr LayerKernels<E> layer_table() {
  return {saved_bytes<E>, forward<E>, backward<E>, inference<E>};
}
template <class E>
constexpr VectorKernels<E> vector_table() {
  return {combine<E>, inner_product<E>, sgd<Compute<E>>};
}

}  // namespace tfnas::TFNAS_ISA
