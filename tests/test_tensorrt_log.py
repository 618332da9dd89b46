"""Reading what an engine is made of from a builder's log: lines of TensorRT-RTX 1.7's, their tensors shortened."""

from __future__ import annotations

from effc.exporters.engine_log import NOT_FOUND, PLUGIN, UNFUSED, read_layers, serve

LINE = "Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [{constants}], Outputs: [ {outputs}], {end}"


def tensor(kind: str) -> str:
    return (
        f"{{ Name: t_myl0, Dimensions: [-1,384], Strides: [384,1], StrideOrder: [1,0], Datatype: {kind}, "
        "Format: (Linear) Row major linear format }"
    )


def line(name, kind, inputs, outputs, nodes, constants=(), tactic="") -> str:
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return LINE.format(
        name=name,
        kind=kind,
        inputs=", ".join(map(tensor, inputs)),
        constants=", ".join(map(tensor, constants)),
        outputs=", ".join(map(tensor, outputs)),
        end=f"TacticName: {tactic}, StreamId: 0, Metadata: {metadata}",
    )


SELF, QUERY, KEY = "layer.0.attention.self", "layer.0.attention.self.query", "layer.0.attention.self.key"
LOG = "\n".join(
    [
        "Registering layer: layer.0.attention.self required by ONNX-TRT",
        "Layers:",
        line("__mye24485_0_myl0_0", "shape_call", [], [], []),
        line(f"{KEY}+{QUERY}_myl0_2", "gemm", ["Int8"], ["Half"], [KEY, QUERY, "node_DequantizeLinear_4"],
             ["Int8", "Float"], "__myelin_CASK_STUB"),
        line("__myl_MulAdd_myl0_4", "kgen", ["Half"], ["Half"], [QUERY, "node_linear"]),
        line(f"{SELF}_myl0_14", "custom_layer", ["Half", "Half", "Half", "Bool"], ["Half", "UInt8"], [SELF]),
        line("__myl_FcAddDivCastErfCastAddMulMul_myl0_10", "runtime_fusion", ["Half"], ["Half"],
             ["node_gelu", "layer.0.intermediate.dense"], ["Half"]),
        line("_gemm_mha_v2_myl0_18", "kgen", ["Half"], ["Half"], ["layer.1.attention.self"]),
        line("__fc119022_myl0_5", "gemm", ["Float"], ["Float"], ["layer.2.attention.self"], ["Float"]),
        "",
        "I/O Tensors:",
        " Name: input_ids, IOMode: Input, DataType: Int64, Dimensions: [-1,-1], Location: Device",
    ]
)  # fmt: skip


def test_each_line_is_a_layer_with_its_nodes_and_types():
    layers = read_layers(LOG)
    assert [layer.kind for layer in layers].count("gemm") == 2 and len(layers) == 7
    product = layers[1]
    assert product.nodes == (KEY, QUERY, "node_DequantizeLinear_4") and product.precision == "int8"
    assert product.inputs == ("Int8", "Int8", "Float") and product.outputs == ("Half",)
    assert product.tactic == "__myelin_CASK_STUB"


def test_layers_of_the_model_are_found_in_the_engine():
    asked = {QUERY: "int8", KEY: "int8", "layer.0.intermediate.dense": "fp16"}
    served = serve(read_layers(LOG), [SELF, "layer.1.attention.self", "layer.2.attention.self"], asked)
    assert served.attention == {
        SELF: PLUGIN,
        "layer.1.attention.self": "TensorRT gemm_mha_v2",
        "layer.2.attention.self": UNFUSED,
    }
    assert served.linears == {QUERY: "int8 gemm", KEY: "int8 gemm", "layer.0.intermediate.dense": "fp16 gemm"}
    assert served.low == {"int8": 1} and served.missed == ()


def test_layers_that_were_to_be_quantized_and_are_not_are_named():
    asked = {QUERY: "int8", "layer.0.intermediate.dense": "int8", "gone": "fp8"}
    served = serve(read_layers(LOG), [], asked)
    assert served.missed == ("layer.0.intermediate.dense", "gone") and served.linears["gone"] == NOT_FOUND


def test_a_plugin_that_reads_fp8_is_no_product():
    """As TensorRT-RTX 1.7 writes it."""
    reads = line(f"{SELF}_myl0_4", "custom_layer", ["FP8", "FP8", "FP8", "Bool"], ["Half", "UInt8"], [SELF])
    served = serve(read_layers(f"Layers:\n{reads}"), [SELF], {})
    assert served.attention == {SELF: f"{PLUGIN}, fp8 inputs"} and served.low == {}


def test_only_the_last_engine_of_a_log_counts():
    again = f"{LOG}\n\nLayers:\n{line('only_myl0_1', 'gemm', ['FP8'], ['Half'], ['only'], ['FP8'])}"
    assert [layer.precision for layer in read_layers(again)] == ["fp8"]


def test_a_log_without_a_list_gives_no_layers():
    assert read_layers("Building engine\nName: x, LayerType: gemm, Inputs: []") == []
