"""A causal model of one attention layer without torch in it, with what it computes in float64, for tests of caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import GenerationConfig

from effc.compiler.generation import Generator
from effc.compiler.generation_build import record_of
from effc.compiler.manifest import GenerationRecord
from effc.exporters.generation_graph import add_caches
from effc.plugins.forms.registry import parse_form
from effc.plugins.function_body import attach_bodies
from effc.plugins.operator import DOMAIN, KEY_MASK, optional_inputs
from effc.plugins.reference import attend, initial_parameters

VOCABULARY = 41
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = 0.5


@dataclass
class ToyModel:
    """Tokens are looked up as queries, keys and values; attention; a product with the head gives logits.

    Attributes:
        form: text of the attention form.
        marked: ids of the tokens that ``global:#ID`` names.
        extras: the operator's further inputs by name.
    """

    form: str
    marked: tuple[int, ...] = ()
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        widths = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
        self.tables = {
            name: random.standard_normal((VOCABULARY, heads * HEAD_DIM), dtype=np.float32)
            for name, heads in widths.items()
        }
        self.tables["head"] = random.standard_normal((HEADS * HEAD_DIM, VOCABULARY), dtype=np.float32)
        learned = initial_parameters(parse_form(self.form), HEADS, KV_HEADS, HEAD_DIM, 3)
        self.extras = {**{name: value.numpy() for name, value in learned.items()}, **self.extras}

    def graph(self) -> ir.Model:
        """The forward graph, as an export gives it."""
        form = parse_form(self.form)
        nodes = [helper.make_node("Cast", ["attention_mask"], [KEY_MASK], to=TensorProto.BOOL)]
        for name in ("query", "key", "value"):
            nodes.append(helper.make_node("Gather", [f"{name}_table", "input_ids"], [name], axis=0))
        given = {KEY_MASK, *self.extras}
        if self.marked:
            nodes += [
                helper.make_node("Unsqueeze", ["input_ids", "last"], ["ids"]),
                helper.make_node("Equal", ["ids", "marked"], ["equal"]),
                helper.make_node("Cast", ["equal"], ["equal_number"], to=TensorProto.INT32),
                helper.make_node("ReduceMax", ["equal_number", "last"], ["any"], keepdims=0),
                helper.make_node("Cast", ["any"], ["marks"], to=TensorProto.BOOL),
            ]
            given.add("marks")
        optional = [name if name in given else "" for name in optional_inputs(form)]
        while not optional[-1]:
            optional.pop()
        attributes = {"pattern": self.form, "causal": 1, "num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SCALE}
        operator = helper.make_node(
            form.op_type, ["query", "key", "value", *optional], ["attended"], name="layer", domain=DOMAIN, **attributes
        )
        nodes += [operator, helper.make_node("MatMul", ["attended", "head_table"], ["logits"])]
        constants = {f"{name}_table": table for name, table in self.tables.items()} | self.extras
        constants |= {"last": np.array([-1]), "marked": np.array(self.marked, np.int64)}
        shape = ["batch", "sequence"]
        widths = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS, "attended": HEADS}
        graph = helper.make_graph(
            nodes,
            "toy",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, VOCABULARY])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
            value_info=[
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape, heads * HEAD_DIM])
                for name, heads in widths.items()
            ],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
        model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))
        attach_bodies(model)
        return model

    def generator(self, folder: Path, kept_in: str = "fp32") -> tuple[Generator, GenerationRecord]:
        """The generating graph in plain ONNX Runtime."""
        graph = self.graph()
        groups, layers = add_caches(graph, kept_in)
        record = record_of(_Ends(), None, groups, layers, 0)
        proto = ir.serde.serialize_model(graph)
        onnx.save(proto, folder / "generation.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(str(folder / "generation.onnx"), options)
        return Generator(session, record, 200), record

    def logits(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The whole text at once in float64, ``[batch, length, vocabulary]``."""
        states = {
            name: torch.from_numpy(self.tables[name][tokens]).double().unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name in ("query", "key", "value")
        }
        extras = {name: torch.from_numpy(array) for name, array in self.extras.items()}
        extras = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in extras.items()}
        if self.marked:
            extras["marks"] = torch.from_numpy(np.isin(tokens, self.marked))
        attended = attend(
            parse_form(self.form),
            **states,
            scale=SCALE,
            causal=True,
            key_mask=torch.from_numpy(mask),
            extras=extras,
        )
        head = torch.from_numpy(self.tables["head"]).double()
        return (attended.transpose(1, 2).flatten(2) @ head).numpy()

    def greedy(self, tokens: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
        """``count`` more tokens, each the most likely one after the whole text was run anew."""
        for _ in range(count):
            chosen = self.logits(tokens, mask)[:, -1].argmax(axis=-1)
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        return tokens


class _Ends:
    """What :func:`record_of` reads of a model."""

    def __init__(self) -> None:
        self.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
        self.config: Any = None

    def forward(self, input_ids: Any, attention_mask: Any) -> None: ...


def prompts(lengths: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of these lengths, padded on the left: tokens and mask ``[batch, longest]``."""
    generator = np.random.default_rng(seed)
    longest = max(lengths)
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(mask, generator.integers(3, VOCABULARY, mask.shape), 0), mask
