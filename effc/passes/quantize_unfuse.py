"""Take fused operators apart whose ONNX Runtime CPU kernel is slower than its parts.

Beside an INT8 product these kernels are what costs: per element, `SkipLayerNormalization` takes as long as hundreds of
INT8 multiplications. Measured over 4096 x 768 values, CPU ms: `SkipLayerNormalization` 24.5, `Sum` and
`LayerNormalization` 7.2; over 512 x 3072: `BiasGelu` 5.7, `Gelu` 2.4. The bias costs nothing where it goes into the
integer product in front.

ONNX Runtime's own optimizer undoes `Add` + `LayerNormalization` by default, so the sum has to be a `Sum`.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.passes.quantize_graph import Editor, replace_value

LAYER_NORMALIZATION_OPSET = 17
GELU_OPSET = 20


def split_slow_fusions(model: ir.Model) -> int:
    """Replace `SkipLayerNormalization` and `BiasGelu` by standard operators, in place.

    Returns:
        how many were replaced.
    """
    opset = model.opset_imports.get("", 0)
    editor = Editor(model.graph)
    replaced = 0
    for node in list(model.graph):
        if node.domain != "com.microsoft":
            continue
        if node.op_type == "SkipLayerNormalization" and opset >= LAYER_NORMALIZATION_OPSET:
            replaced += _split_skip_normalization(editor, node)
        elif node.op_type == "BiasGelu" and opset >= GELU_OPSET:
            biased = editor.insert(node, "Add", node.inputs, like=node.outputs[0], origin=node)
            (result,) = editor.insert(node, "Gelu", biased, like=node.outputs[0], origin=node)
            replace_value(node.outputs[0], result)
            model.graph.remove(node, safe=True)
            replaced += 1
    return replaced


def _split_skip_normalization(editor: Editor, node: ir.Node) -> bool:
    outputs = list(node.outputs)
    if any(output.uses() or output.is_graph_output() for output in outputs[1:3]):
        return False  # Mean and inverse deviation are of no use at inference, and LayerNormalization's differ in form.
    x, skip, scale, shift, *rest = [*node.inputs, None][: max(5, len(node.inputs))]
    like = outputs[0]
    bias = rest[0] if rest else None
    if bias is not None:
        (x,) = editor.insert(node, "Add", [x, bias], like=like, origin=node)
    total = editor.insert(node, "Sum", [x, skip], like=like, origin=node)
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    inputs = [*total, scale] if shift is None else [*total, scale, shift]
    (result,) = editor.insert(node, "LayerNormalization", inputs, attributes, like=like, origin=node)
    replace_value(like, result)
    if len(outputs) > 3:
        replace_value(outputs[3], *total)
    editor.graph.remove(node, safe=True)
    return True
