"""A model with effc's attention through Torch-TensorRT: exported by torch, its attention an operator of torch's.

The exported program runs in plain torch, on CPU too. :func:`compile_program` hands it to Torch-TensorRT with a
converter that makes the operator effc's plugin; no machine of the project can import Torch-TensorRT, so that was never
run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.onnx.ops import _symbolic_impl
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.exporters.onnx_graph import quiet, without_caches
from effc.plugins.forms.linear import Linear
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import DOMAIN
from effc.plugins.pattern import Pattern
from effc.plugins.reference import attend

_OPERATOR = f"{DOMAIN}::attention"


@torch.library.custom_op(_OPERATOR, mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: str,
    causal: bool,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> torch.Tensor:
    """One attention layer by its definition; shapes and arguments of :mod:`effc.plugins.operator`."""

    def heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
        split: torch.Tensor = tensor.unflatten(-1, (count, -1)).transpose(1, 2)
        return split

    attended = attend(
        parse_form(pattern),
        heads(query, num_heads),
        heads(key, kv_num_heads),
        heads(value, kv_num_heads),
        scale=scale,
        causal=causal,
        key_mask=key_mask,
    )
    packed: torch.Tensor = attended.transpose(1, 2).flatten(2).contiguous()
    return packed


@attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def export_program(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, str]]
) -> torch.export.ExportedProgram:
    """Export one forward pass.

    Args:
        model: in eval mode, its attention assigned by the rewrite pass.
        inputs: example arguments of ``forward``.
        axes: for each input, which axes vary.

    Raises:
        PreconditionError: if a layer computes what the plugin does not.
        PassFailedError: if torch cannot export the model.
    """
    dynamic = {name: {axis: torch.export.Dim.AUTO for axis in axes.get(name, {})} for name in inputs}
    try:
        with quiet(), torch.no_grad(), without_caches(model):
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PassFailedError(
            f"torch could not export {type(model).__name__}: {reason.strip()[:300]}.",
            "Run again with --debug for the whole trace.",
        ) from error
    for node in program.graph.nodes:
        if node.target is torch.ops.onnx_symbolic._symbolic.default:
            _give_operator(node)
    program.graph_module.recompile()
    return program


def _give_operator(node: torch.fx.Node) -> None:
    """Make a node that stands for an ONNX operator one of torch's that computes."""
    schema = torch.ops.onnx_symbolic._symbolic.default._schema
    given: dict[str, Any] = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False))
    given |= node.kwargs
    attributes = _symbolic_impl.EncodedAttrs(
        **{name: given[name] for name in _symbolic_impl.EncodedAttrs.__dataclass_fields__}
    ).to_dict()
    form, inputs = parse_form(str(attributes["pattern"])), list(given["inputs"])
    if not isinstance(form, (Pattern, Linear)) or len(inputs) > 4:
        what = f"'{form}'" if len(inputs) <= 4 else f"'{form}' with inputs besides its mask"
        raise PreconditionError(
            f"'{attributes['layer']}' computes {what}, which is not converted for Torch-TensorRT.",
            "Use --target=tensorrt_rtx or tensorrt.",
        )
    query, key, value = inputs[:3]
    mask = inputs[3] if len(inputs) == 4 else None
    with node.graph.inserting_before(node):
        made = node.graph.call_function(
            torch.ops.effc.attention.default,
            (
                query,
                key,
                value,
                mask,
                str(form),
                bool(attributes["causal"]),
                attributes["num_heads"],
                attributes["kv_num_heads"],
                attributes["scale"],
            ),
        )
    made.meta.update(node.meta)
    made.meta["effc_layer"] = attributes["layer"]
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


@contextlib.contextmanager
def moved(model: PreTrainedModel, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Have the model elsewhere and its parameters in another type for a while. Buffers keep theirs: angles need it."""
    parameters = {parameter: parameter.data for parameter in model.parameters()}
    buffers = [
        (module, name, value)
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]
    try:
        for parameter, data in parameters.items():
            parameter.data = data.to(device, dtype if data.is_floating_point() else data.dtype)
        for module, name, value in buffers:
            module._buffers[name] = value.to(device)
        yield
    finally:
        for parameter, data in parameters.items():
            parameter.data = data
        for module, name, value in buffers:
            module._buffers[name] = value


def compile_program(
    program: torch.export.ExportedProgram, largest: Mapping[str, Sequence[int]], library: Path | None, path: Path
) -> None:
    """Compile with Torch-TensorRT and save an exported program that holds engines. Never run.

    Args:
        largest: shape of each input, by name, that the engines are tuned for; every size below is taken.
        library: effc's TensorRT plugin; without it attention stays in torch.
    """
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    if library is not None:
        trt = importlib.import_module("tensorrt")
        trt.get_plugin_registry().load_library(str(library))
        conversion = importlib.import_module("torch_tensorrt.dynamo.conversion")
        register = conversion.dynamo_tensorrt_converter(torch.ops.effc.attention.default, supports_dynamic_shapes=True)
        register(lambda context, target, args, kwargs, name: _add_plugin(trt, context.net, args, name))
    inputs = {
        name: torch_tensorrt.Input(
            min_shape=(1,) * len(shape), opt_shape=tuple(shape), max_shape=tuple(shape), dtype=torch.int64, name=name
        )
        for name, shape in largest.items()
    }
    compiled = torch_tensorrt.dynamo.compile(program, arg_inputs=(), kwarg_inputs=inputs)
    torch_tensorrt.save(compiled, str(path), arg_inputs=(), kwarg_inputs=inputs)


def _add_plugin(trt: Any, network: Any, args: Sequence[Any], name: str) -> Any:
    query, key, value, mask, pattern, causal, num_heads, kv_num_heads, scale = args
    operator = "SparseAttention" if isinstance(parse_form(pattern), Pattern) else "LinearAttention"
    given: dict[str, NDArray[Any]] = {
        "pattern": np.frombuffer(pattern.encode(), np.int8),
        "inputs": np.frombuffer(b"" if mask is None else b"key_mask", np.int8),
        "causal": np.array([causal], np.int32),
        "num_heads": np.array([num_heads], np.int32),
        "kv_num_heads": np.array([kv_num_heads], np.int32),
        "scale": np.array([scale], np.float32),
    }
    kinds = {np.int8: trt.PluginFieldType.CHAR, np.int32: trt.PluginFieldType.INT32}
    fields = [
        trt.PluginField(key, data, kinds.get(data.dtype.type, trt.PluginFieldType.FLOAT32))
        for key, data in given.items()
    ]
    creator = trt.get_plugin_registry().get_creator(operator, "1", DOMAIN)
    plugin = creator.create_plugin(name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    return network.add_plugin_v3(tensors, [], plugin).get_output(0)
