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

// Images that a thread takes through the block together: their wide tensor shall stay in its share of the
// last cache, and more of them share one packing of the weights.
template <class E>
int64_t images_together(const Layer<Compute<E>>& layer, const Geometry& image, int64_t most) {
  const int64_t wide = layer.candidates[0].width * image.m2 * static_cast<int64_t>(sizeof(E));
  return minimum(most, maximum<int64_t>(1, (2 << 20) / wide));
}

template <class E>
void infer(const Layer<Compute<E>>& layer, const E* x, E* out, const Threads& threads) {
  Scratch scratch;
  void* saved = scratch.take<char>(saved_bytes<E>(layer));
  run_forward(layer, x, out, saved, BatchStatistics<Compute<E>>{}, false, threads);
}

template <class E>
void inference(const Layer<Compute<E>>& layer, const E* x, E* out, const Threads& threads) {
  Layer<Compute<E>> strips = layer;
  strips.design = Design::strips;
  const bool by_image = layer.batch % threads.count == 0 || layer.batch >= 4 * threads.count;
  if (!by_image) return infer(strips, x, out, threads);
  const Geometry image =
      geometry_of(1, layer.height, layer.width, layer.in_channels, layer.out_channels, layer.stride);
  parallel(threads, [&](int thread) {
    const Range range = share(layer.batch, thread, threads.count);
    const int64_t together = images_together<E>(layer, image, range.end - range.begin);
    for (int64_t n = range.begin; n < range.end; n += together) {
      Layer<Compute<E>> group = strips;
      group.batch = minimum(together, range.end - n);
      infer(group, x + n * image.m * image.in_channels, out + n * image.m2 * image.out_channels,
            Threads{1, threads.run});
    }
  });
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
