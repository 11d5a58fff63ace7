"""Engine `onnxruntime`: sections are inference sessions, their graphs written straight from the modules.

The general exporter takes seconds a block; a table needs hundreds. The blocks have one shape, so their graphs are
built here, batch norms unfolded: folding and fusing is the session's own business, as in a deployed network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tfnas.latency.chain import Section
from tfnas.latency.engine import Conditions, EngineUnavailable, require_own
from tfnas.latency.engine_torch import TorchEngine
from tfnas.network import Head, MBInvRes, SqueezeExcite, Stem, build_network
from tfnas.space import Space

if TYPE_CHECKING:
    from tfnas.architecture import Architecture

OPSET = 17
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxruntimeEngine(TorchEngine):
    """Sessions of onnxruntime's CPU or CUDA provider, all graph optimisations on.

    On the CPU `conditions.threads` threads; on a GPU torch's current stream, which must not be the default one, and no
    call waits for the device. Inputs and outputs are bound to memory on the device, so nothing is copied; a section's
    output is overwritten by its next call. Raises `EngineUnavailable` where onnxruntime or onnx is not installed, the
    onnxruntime installed has no provider for the device, or the conditions are not its own (float32; it chooses layouts
    itself, inputs are NCHW).
    """

    def __init__(self, space: Space, conditions: Conditions) -> None:
        require_own(conditions, "onnxruntime", dtype="float32", layout="nchw")
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise EngineUnavailable(
                f"engine 'onnxruntime' needs packages that are not installed ({error}); run: "
                "pip install 'tfnas-ext[export]'"
            ) from None
        self._onnx, self._onnxruntime = onnx, onnxruntime
        self._device = torch.device(conditions.device)
        self._provider = PROVIDERS[self._device.type]
        if self._provider not in onnxruntime.get_available_providers():
            raise EngineUnavailable(
                f"engine 'onnxruntime': the onnxruntime installed ({onnxruntime.__version__}) has no {self._provider} "
                f"for device {conditions.device!r}, only {', '.join(onnxruntime.get_available_providers())}; for a GPU "
                "install onnxruntime-gpu"
            )
        super().__init__(space, conditions)

    def network(self, arch: Architecture) -> list[Section]:
        """One session for the whole network, as it would be deployed."""

        def make() -> nn.Sequential:
            network = build_network(arch)
            blocks = [block for stage in network.stages.children() for block in stage.children()]
            return nn.Sequential(network.stem, *blocks, network.head)

        return [self._section(make)]

    def _section(self, make: Callable[[], nn.Module]) -> Section:
        model = OnnxGraph(self._onnx).model(self.module(make))
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.conditions.threads
        options.inter_op_num_threads = 1
        session = self._onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[(self._provider, self._provider_options())]
        )
        return BoundSession(session, self._device, self._run_options())

    def _run_options(self) -> Any:
        options = self._onnxruntime.RunOptions()
        if self._device.type != "cpu":
            # a call would wait for its own end, which a timer holds back until everything is queued
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _provider_options(self) -> dict[str, str]:
        if self._device.type == "cpu":
            return {}
        stream = torch.cuda.current_stream(self._device)
        # 0 is taken for "none": onnxruntime would work on a stream of its own, beside all time stamps
        if stream.cuda_stream == 0:
            raise EngineUnavailable("engine 'onnxruntime' needs another stream than torch's default one on a GPU")
        return {"device_id": str(stream.device_index), "user_compute_stream": str(stream.cuda_stream)}


class BoundSession:
    """A session called with a torch tensor [N, C, H, W], float32 on `device`; returns the same buffer every time."""

    def __init__(self, session: Any, device: torch.device, run_options: Any = None) -> None:
        self._session, self._device, self._run_options = session, device, run_options
        self._shapes: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        binding = self._session.io_binding()
        self._bind(binding.bind_input, "x", x)
        y = self._shapes.get(x.shape)
        if y is None:  # the first call tells the output's shape
            (first,) = self._session.run(None, {"x": x.cpu().numpy()})
            y = self._shapes[x.shape] = torch.empty(first.shape, device=self._device)
        self._bind(binding.bind_output, "y", y)
        self._session.run_with_iobinding(binding, self._run_options)
        return y

    def _bind(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        index = self._device.index or 0
        bind(name, self._device.type, index, np.float32, list(tensor.shape), tensor.data_ptr())


class OnnxGraph:
    """Writes modules of `tfnas.network`, in evaluation mode, as nodes of one ONNX graph from "x" to "y"."""

    def __init__(self, onnx: Any) -> None:
        self._helper, self._numpy_helper = onnx.helper, onnx.numpy_helper
        self._float = onnx.TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def model(self, module: nn.Module) -> Any:
        """The whole model (`onnx.ModelProto`); shapes are left open."""
        last = self.add(module, "x")
        shape = ["n", "classes"] if self.nodes[-1].op_type == "Gemm" else ["n", "c_out", "h_out", "w_out"]
        self._node("Identity", [last], output="y")
        make = self._helper.make_tensor_value_info
        graph = self._helper.make_graph(
            self.nodes,
            "section",
            [make("x", self._float, ["n", "c", "h", "w"])],
            [make("y", self._float, shape)],
            self.weights,
        )
        opset = self._helper.make_opsetid("", OPSET)
        return self._helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def add(self, module: nn.Module, x: str) -> str:
        """Append `module` applied to value `x`; returns the name of its output."""
        if isinstance(module, nn.Sequential):
            for child in module:
                x = self.add(child, x)
            return x
        if isinstance(module, Stem):
            return self.add(module.block, self._chain(x, module.conv_stem, module.bn1, module.act1))
        if isinstance(module, Head):
            y = self._chain(x, module.conv_head, module.bn2, module.act2)
            return self.add(module.classifier, self._node("Flatten", [self._node("GlobalAveragePool", [y])]))
        if isinstance(module, MBInvRes):
            y = self._chain(x, module.conv_pw, module.bn1, module.act1) if module.expand else x
            y = self._chain(y, module.conv_dw, module.bn2, module.act2, module.se, module.conv_pwl, module.bn3)
            return self._node("Add", [x, y]) if module.has_residual else y
        if isinstance(module, SqueezeExcite):
            mean = self._node("GlobalAveragePool", [x])
            gate = self._chain(mean, module.conv_reduce, module.act1, module.conv_expand)
            return self._node("Mul", [x, self._node("Sigmoid", [gate])])
        return self._leaf(module, x)

    def _chain(self, x: str, *modules: nn.Module) -> str:
        for module in modules:
            x = self.add(module, x)
        return x

    def _leaf(self, module: nn.Module, x: str) -> str:
        if isinstance(module, nn.Conv2d):
            pads = [int(p) for p in module.padding] * 2 if isinstance(module.padding, tuple) else []
            inputs = [x, *self._tensors(module.weight, module.bias)]
            return self._node("Conv", inputs, strides=list(module.stride), pads=pads, group=module.groups)
        if isinstance(module, nn.BatchNorm2d):
            tensors = self._tensors(module.weight, module.bias, module.running_mean, module.running_var)
            return self._node("BatchNormalization", [x, *tensors], epsilon=module.eps)
        if isinstance(module, nn.Linear):
            return self._node("Gemm", [x, *self._tensors(module.weight, module.bias)], transB=1)
        if isinstance(module, nn.SiLU):
            return self._node("Mul", [x, self._node("Sigmoid", [x])])
        if isinstance(module, nn.Hardswish):
            return self._node("HardSwish", [x])
        if isinstance(module, nn.ReLU6):
            limits = self._tensors(torch.tensor(0.0), torch.tensor(6.0))
            return self._node("Clip", [x, *limits])
        if isinstance(module, nn.ReLU):
            return self._node("Relu", [x])
        if isinstance(module, nn.Identity):
            return x
        raise EngineUnavailable(f"engine 'onnxruntime' knows no {type(module).__name__}")

    def _tensors(self, *values: torch.Tensor | None) -> list[str]:
        names = []
        for value in values:
            if value is not None:
                names.append(f"w{len(self.weights)}")
                array = np.ascontiguousarray(value.detach().cpu().numpy())
                self.weights.append(self._numpy_helper.from_array(array, names[-1]))
        return names

    def _node(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(kind, inputs, [name], **attributes))
        return name
