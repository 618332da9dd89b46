"""Hand-made artifacts: a graph of a few nodes with one sparse attention layer, and the effc.json that belongs to it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from effc.compiler.manifest import AttentionLayer, FileRecord, Manifest, SourceRecord, TensorRecord

VOCABULARY = 50
WIDTH = 16
LAYER = "encoder.layer.0.attention.self"


def token_model(
    path: Path, *, work: int = 0, mask: bool = True, vocabulary: int = VOCABULARY, seed: int = 0
) -> onnx.ModelProto:
    """Embedding, masked attention as ``effc::SparseAttention`` with a function body, an fp32 and an int8 product.

    Args:
        work: further WIDTH x WIDTH products, which make the model slower without changing its values (identities).
    """
    random = np.random.default_rng(seed)
    initializers = [
        numpy_helper.from_array(random.standard_normal((vocabulary, WIDTH)).astype(np.float32), "table"),
        numpy_helper.from_array(random.standard_normal((2, WIDTH)).astype(np.float32), "types"),
        numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH)).astype(np.float32), "weight"),
        # 7 bits, because CPUs without VNNI add pairs of products in 16.
        numpy_helper.from_array(random.integers(-63, 64, (WIDTH, WIDTH)).astype(np.int8), "weight_int8"),
        numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "identity"),
        numpy_helper.from_array(np.float32(0.01), "weight_scale"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["kinds"]),
        helper.make_node("Add", ["words", "kinds"], ["hidden"]),
        *([helper.make_node("Cast", ["attention_mask"], ["visible"], to=TensorProto.BOOL)] if mask else []),
        helper.make_node(
            "SparseAttention",
            ["hidden", "hidden", "hidden", *(["visible"] if mask else [])],
            ["attended"],
            name=LAYER,
            domain="effc",
            overload="dense",
            pattern="local:4096",
            causal=0,
            num_heads=2,
            kv_num_heads=2,
            scale=0.3,
        ),
        helper.make_node("MatMul", ["attended", "weight"], ["product"], name="float_product"),
        helper.make_node("DynamicQuantizeLinear", ["product"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "weight_int8", "zero"], ["integers"], name="int8_product"),
        helper.make_node("Cast", ["integers"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "weight_scale"], ["both_scales"]),
        helper.make_node("Mul", ["floats", "both_scales"], ["state_0"]),
        *(
            helper.make_node("MatMul", [f"state_{i}", "identity"], [f"state_{i + 1}"], name=f"work_{i}")
            for i in range(work)
        ),
        helper.make_node("Identity", [f"state_{work}"], ["last_hidden_state"]),
    ]
    nodes.append(helper.make_node("ReduceMean", ["last_hidden_state", "axes"], ["pooler_output"], keepdims=0))
    initializers.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"))
    names = ["input_ids", *(["attention_mask"] if mask else []), "token_type_ids"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", WIDTH]),
            helper.make_tensor_value_info("pooler_output", TensorProto.FLOAT, ["batch", WIDTH]),
        ],
        initializers,
    )
    model = helper.make_model(
        graph,
        functions=[_attention_body(mask)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("effc", 1)],
        ir_version=10,
    )
    onnx.save(model, path)
    return model


def _attention_body(mask: bool) -> onnx.FunctionProto:
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[1, 2]),
        *(_square_mask() if mask else []),
        helper.make_node(
            "Attention",
            ["query", "key", "value", *(["mask4"] if mask else [])],
            ["out"],
            name="core",
            q_num_heads=2,
            kv_num_heads=2,
            scale=0.3,
        ),
    ]
    function = helper.make_function(
        "effc",
        "SparseAttention",
        ["query", "key", "value", *(["mask"] if mask else [])],
        ["out"],
        nodes,
        [helper.make_opsetid("", 23)],
        ["pattern", "causal", "num_heads", "kv_num_heads", "scale"],
    )
    function.overload = "dense"
    return function


def _square_mask() -> list[onnx.NodeProto]:
    """Keys' mask ``[batch, length]`` for every query: the ``Attention`` operator does not broadcast it."""
    return [
        helper.make_node("Unsqueeze", ["mask", "axes"], ["keys"]),
        helper.make_node("Transpose", ["keys"], ["queries"], perm=[0, 1, 3, 2]),
        helper.make_node("Not", ["queries"], ["hidden_queries"]),
        helper.make_node("Or", ["queries", "hidden_queries"], ["every_query"]),
        helper.make_node("And", ["keys", "every_query"], ["mask4"]),
    ]


def token_manifest(directory: Path, *, mask: bool = True, max_length: int | None = 64) -> Manifest:
    """The effc.json for :func:`token_model` in ``directory``."""
    names = ["input_ids", *(["attention_mask"] if mask else []), "token_type_ids"]
    maximum = {"input_ids": VOCABULARY - 1, "attention_mask": 1, "token_type_ids": 1}
    return manifest_for(
        directory,
        inputs=[
            TensorRecord(name=name, dtype="int64", shape=["batch", "sequence"], maximum=maximum[name]) for name in names
        ],
        outputs=[
            TensorRecord(name="last_hidden_state", dtype="float32", shape=["batch", "sequence", WIDTH]),
            TensorRecord(name="pooler_output", dtype="float32", shape=["batch", WIDTH]),
        ],
        max_length=max_length,
    )


def manifest_for(
    directory: Path, *, inputs: list[TensorRecord], outputs: list[TensorRecord], max_length: int | None
) -> Manifest:
    """A manifest with one rewritten attention layer over whatever files ``directory`` holds."""
    files = {
        file.name: FileRecord(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size)
        for file in sorted(directory.iterdir())
        if file.name != "effc.json"
    }
    return Manifest(
        effc_version="0.1.0",
        created=datetime.now(UTC),
        target="onnxruntime",
        source=SourceRecord(
            path="tiny",
            kind="directory",
            model_type="bert",
            architecture="TinyModel",
            task="feature-extraction",
            parameters=1000,
            max_length=max_length,
            fingerprint="0",
        ),
        recipe={},
        toolchain={"onnxruntime": "1.31.1"},
        export_key="0",
        passes=[],
        attention=[
            AttentionLayer(
                layer=LAYER,
                source="dense",
                pattern="local:4096",
                causal=False,
                num_heads=2,
                kv_heads=2,
                head_dim=8,
                rewritten=True,
            )
        ],
        inputs=inputs,
        outputs=outputs,
        files=files,
    )


def make_artifact(directory: Path, *, mask: bool = True, max_length: int | None = 64, work: int = 0) -> Path:
    """A whole artifact directory, ready for ``effc.load``."""
    directory.mkdir(parents=True, exist_ok=True)
    token_model(directory / "model.onnx", mask=mask, work=work)
    manifest = token_manifest(directory, mask=mask, max_length=max_length)
    (directory / "effc.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    return directory


def image_artifact(directory: Path) -> Path:
    """A model of fixed input size ``[batch, 3, 4, 4]`` with five positions."""
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["shape"], value_ints=[0, 3, 16]),
            helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"]),
            helper.make_node("Constant", [], ["starts"], value_ints=[0]),
            helper.make_node("Constant", [], ["ends"], value_ints=[5]),
            helper.make_node("Constant", [], ["axis"], value_ints=[2]),
            helper.make_node("Slice", ["flat", "starts", "ends", "axis"], ["five"]),
            helper.make_node("Transpose", ["five"], ["last_hidden_state"], perm=[0, 2, 1]),
        ],
        "image",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", 5, 3])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), directory / "model.onnx"
    )
    manifest = manifest_for(
        directory,
        inputs=[TensorRecord(name="pixel_values", dtype="float32", shape=["batch", 3, 4, 4])],
        outputs=[TensorRecord(name="last_hidden_state", dtype="float32", shape=["batch", 5, 3])],
        max_length=None,
    )
    (directory / "effc.json").write_text(manifest.model_dump_json())
    return directory
