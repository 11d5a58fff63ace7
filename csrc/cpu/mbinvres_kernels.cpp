// Compiled once per instruction set: the table of the MBInvRes kernels.
#include "cpu/mbinvres_backward_layer.h"
#include "cpu/mbinvres_vector.h"

namespace tfnas::TFNAS_ISA {
namespace {

template <class T>
int64_t saved_size(const Layer<T>& layer) {
  Scratch scratch;
  LayerPlan<T>& plan = *scratch.take<LayerPlan<T>>(1);
  make_plan<T>(layer, nullptr, plan);
  return plan.saved;
}

template <class T>
void forward(const Layer<T>& layer, const T* x, T* out, T* saved, const BatchStatistics<T>& statistics,
             const Threads& threads) {
  run_forward(layer, x, out, saved, statistics, true, threads);
}

template <class T>
void backward(const Layer<T>& layer, const T* x, const T* saved, const T* dout, T* dx, T* dmix,
              const CandidateGradient<T>* gradients, const Threads& threads) {
  run_backward(layer, x, saved, dout, dx, dmix, gradients, threads);
}

template <class T>
void inference(const Layer<T>& layer, const T* x, T* out, const Threads& threads) {
  Scratch scratch;
  Layer<T> strips = layer;
  strips.design = Design::strips;
  T* saved = scratch.take<T>(saved_size(strips));
  run_forward(strips, x, out, saved, BatchStatistics<T>{}, false, threads);
}

}  // namespace

extern const LayerKernels<float> layer_kernels;
const LayerKernels<float> layer_kernels = {saved_size<float>, forward<float>, backward<float>,
                                           inference<float>};
extern const VectorKernels<float> vector_kernels;
const VectorKernels<float> vector_kernels = {combine<float>, inner_product<float>, sgd<float>};

#if defined(CPU_CAPABILITY_DEFAULT)  // float64 exists once, for gradient checks: plain loops
extern const LayerKernels<double> layer_kernels_double;
const LayerKernels<double> layer_kernels_double = {saved_size<double>, forward<double>, backward<double>,
                                                   inference<double>};
extern const VectorKernels<double> vector_kernels_double;
const VectorKernels<double> vector_kernels_double = {combine<double>, inner_product<double>, sgd<double>};
#endif

}  // namespace tfnas::TFNAS_ISA
