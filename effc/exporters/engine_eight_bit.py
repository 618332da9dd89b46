"""FP8 queries, keys and values handed to effc's plugin as they are, instead of back in floats.

What quantizing attention leaves in front of an operator are pairs of QuantizeLinear and DequantizeLinear with one
constant scale. ONNX Runtime needs the second; the plugin's FP8 kernels (docs/cuda.md) read the codes, and their scales
are attributes of the node.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.passes.quantize_graph import constant_of
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import Pattern

SCALES = ("query_scale", "key_scale", "value_scale")
OUTPUT_TYPE = "output_type"
# What the kernels take and give, see refusal() in cpp_plugins/cuda/sparse_attention.cu.
_HEAD_UNIT, _MOST_HEAD_DIM = 16, 256
_OUTPUTS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_codes(graph: ir.Graph, node: ir.Node, geometry: AttentionGeometry) -> bool:
    """Let a plugin node read FP8, in place, and say whether it does: if all three inputs are such pairs.

    Dequantized numbers that nothing else reads go. INT8 stays as it was: there are no kernels for it.
    """
    fits = geometry.head_dim % _HEAD_UNIT == 0 and geometry.head_dim <= _MOST_HEAD_DIM
    if not fits or node.op_type != Pattern.op_type or node.outputs[0].dtype not in _OUTPUTS:
        return False
    pairs = [_codes_behind(value) for value in node.inputs[:3]]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return False
    dequantized = {value.producer() for value in node.inputs[:3] if value is not None}
    for place, (name, (codes, scale)) in enumerate(zip(SCALES, found, strict=True)):
        node.replace_input_with(place, codes)
        node.attributes[name] = ir.AttrFloat32(name, scale)
    node.attributes[OUTPUT_TYPE] = ir.AttrInt64(OUTPUT_TYPE, int(node.outputs[0].dtype))
    unread = [producer for producer in dequantized if producer is not None and not producer.outputs[0].uses()]
    graph.remove(unread, safe=True)
    return True


def _codes_behind(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """The FP8 numbers that a value is, and their scale; None if it is something else."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.outputs[0].is_graph_output():
        return None
    codes, scale = producer.inputs[0], constant_of(producer.inputs[1])
    if codes is None or codes.dtype != ir.DataType.FLOAT8E4M3FN or scale is None or scale.size != 1:
        return None
    # In the precision that QuantizeLinear divides by.
    return codes, float(scale.numpy().astype("float32").reshape(()))
