"""One of effc's attention operators as a model of its own, and random inputs for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper

from effc.plugins.function_body import function_body
from effc.plugins.operator import DOMAIN, KEY_MASK, AttentionGeometry, optional_inputs
from effc.plugins.reference import attend


def one_node_model(geometry: AttentionGeometry, masked: bool, extras: Mapping[str, np.ndarray] | None = None):
    """A model of one operator node with its function body; ``extras`` become inputs of the model, by name."""
    width, kv_width = geometry.num_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    inputs = [helper.make_tensor_value_info("query", TensorProto.FLOAT, ["batch", "queries", width])]
    for name in ("key", "value"):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "keys", kv_width]))
    if masked:
        inputs.append(helper.make_tensor_value_info(KEY_MASK, TensorProto.BOOL, ["batch", "keys"]))
    for name, array in (extras or {}).items():
        shape = ["batch", "keys"] if name == "marks" else list(array.shape)
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    given = frozenset(extras or ()) | ({KEY_MASK} if masked else frozenset())
    optional = [name if name in given else "" for name in optional_inputs(geometry.form)]
    while optional and not optional[-1]:
        optional.pop()
    node = helper.make_node(
        geometry.form.op_type,
        ["query", "key", "value", *optional],
        ["output"],
        domain=DOMAIN,
        pattern=str(geometry.form),
        causal=int(geometry.causal),
        num_heads=geometry.num_heads,
        kv_num_heads=geometry.kv_heads,
        scale=geometry.scale,
    )
    node.overload = geometry.overload(given)
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "queries", width])
    return helper.make_model(
        helper.make_graph([node], "one_node", inputs, [output]),
        functions=[ir.serde.serialize_function(function_body(geometry, given))],
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid(DOMAIN, 1),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Plain ONNX Runtime: no effc library registered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def random_inputs(
    geometry: AttentionGeometry, batch: int, queries: int, keys: int, seed: int, padding: str
) -> dict[str, np.ndarray]:
    """Inputs by name; ``padding`` is one of none, left, right, holes, all."""
    rng = np.random.default_rng(seed)
    feed = {
        "query": rng.standard_normal((batch, queries, geometry.num_heads * geometry.head_dim), dtype=np.float32),
        "key": rng.standard_normal((batch, keys, geometry.kv_heads * geometry.head_dim), dtype=np.float32),
        "value": rng.standard_normal((batch, keys, geometry.kv_heads * geometry.head_dim), dtype=np.float32),
    }
    mask = np.ones((batch, keys), dtype=bool)
    for row in mask:
        cut = int(rng.integers(0, keys))
        if padding == "left":
            row[:cut] = False
        elif padding == "right":
            row[keys - cut :] = False
        elif padding == "holes":
            row[:] = rng.random(keys) < 0.5
        elif padding == "all":
            row[:] = False
    return feed | {"key_mask": mask}


def expected(
    geometry: AttentionGeometry, feed: Mapping[str, np.ndarray], extras: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """The float64 reference, packed like the operator's output."""

    def heads(name: str, count: int) -> torch.Tensor:
        tensor = torch.from_numpy(feed[name]).double()
        return tensor.view(*tensor.shape[:2], count, geometry.head_dim).transpose(1, 2)

    tensors = {name: torch.from_numpy(array) for name, array in (extras or {}).items()}
    result = attend(
        geometry.form,
        heads("query", geometry.num_heads),
        heads("key", geometry.kv_heads),
        heads("value", geometry.kv_heads),
        scale=geometry.scale,
        causal=geometry.causal,
        key_mask=torch.from_numpy(feed["key_mask"]),
        extras={name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
    )
    return result.transpose(1, 2).flatten(2).numpy()
