// The Python module tfnas_ext._C. Importing it registers the operators of csrc/ops (torch.ops.tfnas).
// The only file with torch's Python headers: pybind.h passes tensors and costs a third of torch/extension.h.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

#include "cpu/capability.h"
#include "engine/supernet_engine.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for would run on one thread: compile with -fopenmp"
#endif

namespace py = pybind11;

namespace {

// (kernel_size, max_width, se_channels, offsets of mid, depthwise, se_weight, se_reduce_bias, se_expand_bias)
using CandidateTuple = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// (in_channels, out_channels, stride, act, residual, gated, candidates)
using LayerTuple = std::tuple<int64_t, int64_t, int, std::string, bool, bool, std::vector<CandidateTuple>>;

tfnas::LayerSpec layer_spec(const LayerTuple& layer) {
  const auto& [in, out, stride, act, residual, gated, candidates] = layer;
  tfnas::LayerSpec spec{in, out, stride, tfnas::parse_act(act), residual, gated, {}};
  for (const auto& [kernel, width, se, mid, depthwise, se_weight, reduce_bias, expand_bias] : candidates)
    spec.candidates.push_back({kernel, width, se, mid, depthwise, se_weight, reduce_bias, expand_bias});
  return spec;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of tfnas_ext";
  m.def(
      "cpu_capability", [] { return std::string(tfnas::capability_name(tfnas::cpu_capability())); },
      "Instruction set of the CPU kernels: generic, avx2, avx512 or avx512_bf16");
  m.def(
      "best_cpu_capability", [] { return std::string(tfnas::capability_name(tfnas::best_cpu_capability())); },
      "The widest instruction set that this processor can run");

  // The supernet's engine; tfnas_ext/engine_native.py wraps it and checks its arguments.
  using tfnas::SupernetEngine;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<tfnas::Tape, std::shared_ptr<tfnas::Tape>>(m, "Tape");
  py::class_<SupernetEngine>(m, "SupernetEngine")
      .def(py::init([](const std::vector<LayerTuple>& layers, std::vector<int64_t> depths, int64_t max_depth,
                       bool sinks, double eps) {
        tfnas::BodySpec spec{{}, std::move(depths), max_depth, sinks, eps};
        for (const LayerTuple& layer : layers) spec.layers.push_back(layer_spec(layer));
        return SupernetEngine(std::move(spec));
      }))
      .def("set_widths", &SupernetEngine::set_widths)
      .def("widths", &SupernetEngine::widths)
      .def("forward_paths", &SupernetEngine::forward_paths, unlocked)
      .def("backward_paths", &SupernetEngine::backward_paths, unlocked)
      .def("forward_mixture", &SupernetEngine::forward_mixture, unlocked)
      .def("backward_mixture", &SupernetEngine::backward_mixture, unlocked)
      .def("memory_bytes", &SupernetEngine::memory_bytes)
      .def("read_gradients", &SupernetEngine::read_gradients)
      .def("gradient_buffers", &SupernetEngine::gradient_buffers)
      .def(
          "clip_and_sgd",
          [](SupernetEngine& engine, const SupernetEngine::Weights& weights,
             const SupernetEngine::Weights& momenta, const std::vector<at::Tensor>& dense, double lr,
             double momentum, double weight_decay, double max_norm) {
            return engine.clip_and_sgd(weights, momenta, dense, {lr, momentum, weight_decay, max_norm});
          },
          unlocked);
}
