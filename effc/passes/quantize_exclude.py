"""Which layers stay in fp32, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.quantize_find import Columns, Embedding, Linear
from effc.passes.quantize_schemes import ELSEWHERE, Schemes
from effc.suggest import nearest

# Below this width a product is over before quantizing its input has paid off: 512 x 32 times 32 x 128 breaks even.
LEAST_WIDTH = 32
# A table below this size costs nothing to keep.
LEAST_TABLE_BYTES = 64 * 1024
# What is computed from a layer's output by one of these is no longer just that output in another shape.
_MIXING = frozenset(
    {
        "LayerNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "RMSNormalization",
        "GroupNormalization",
        "BatchNormalization",
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "Conv",
        "Einsum",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
    }
)


_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Cast", "Erf", "Tanh", "Sigmoid", "Gelu", "BiasGelu", "FastGelu"}
    | {"QuickGelu", "Swish", "HardSwish", "HardSigmoid", "Relu", "Elu", "Softplus", "Mish", "Clip", "Sqrt", "Exp"}
)


@dataclass(frozen=True)
class Rules:
    """Which rules of thumb hold for a mode.

    Attributes:
        gated: leave products behind gates in fp32: one scale per tensor cannot hold their outliers.
        heads: leave output heads in fp32: their error is not dampened.
        small: leave small layers in fp32: the mode is there for speed.
    """

    gated: bool = True
    heads: bool = True
    small: bool = True


class Exclusion:
    """Answers why a layer is not quantized.

    Args:
        graph: the graph as it is before anything is quantized.
        globs: the recipe's; each is tried on module, weight and node names.
        schemes: the mode of every layer; all have ``mode`` if None.
        mode: the one that is asked about.
        rules: of that mode.
    """

    def __init__(
        self,
        graph: ir.Graph,
        globs: Iterable[str],
        schemes: Schemes | None = None,
        mode: str = "int8",
        rules: Rules = Rules(),
    ):
        self.globs = tuple(globs)
        self._outputs = set(graph.outputs)
        self._schemes, self._mode, self._rules = schemes, mode, rules

    def of_linear(self, linear: Linear, column: int) -> str | None:
        """Why these columns of a linear layer stay in fp32, or None; ``ELSEWHERE`` where their mode is another."""
        columns = linear.columns[column]
        width, names = columns.stop - columns.start, (columns.name, linear.weight_name, linear.node.name)
        if (glob := self._glob(*names)) is not None:
            return f"excluded by '{glob}'"
        if (reason := self._of_mode(*names)) is not None:
            return reason
        if linear.dtype != ir.DataType.FLOAT:
            return f"its weight is {linear.dtype.name.lower()}, not float32"
        if not _is_plain(linear.node):
            return f"its {linear.node.op_type} scales or transposes its input, or adds a bias computed at run time"
        if self._schemes is not None and self._schemes.asked(*names):
            return None
        if self._rules.small and min(linear.fan_in, width) < LEAST_WIDTH:
            return f"{linear.fan_in} x {width} is too small to gain"
        if self._rules.gated and is_gated(linear.node.inputs[0]):
            return "its input is one activation times another (a gated MLP), whose outliers 8 bits cannot hold"
        if self._rules.heads and self._only_feeds_outputs(columns.output):
            return "output head: nothing behind it dampens its error"
        return None

    def mode_reason(self, embedding: Embedding) -> str | None:
        """Why a table is not of this mode, or None; whether it is worth it is not asked."""
        names = (embedding.name, embedding.table_name, embedding.node.name)
        glob = self._glob(*names)
        return self._of_mode(*names) if glob is None else f"excluded by '{glob}'"

    def _of_mode(self, *names: str | None) -> str | None:
        if self._schemes is None:
            return None
        mode, why = self._schemes.of(*names)
        if mode == self._mode:
            return None
        return why if mode == "none" else ELSEWHERE

    def is_head(self, columns: Columns) -> bool:
        """Whether these columns are an output head."""
        return self._only_feeds_outputs(columns.output)

    def of_embedding(self, embedding: Embedding) -> str | None:
        """Why a table stays in fp32, or None."""
        tensor, table = embedding.tensor(), embedding.node.inputs[0]
        if (glob := self._glob(embedding.name, embedding.table_name, embedding.node.name)) is not None:
            return f"excluded by '{glob}'"
        if (reason := self._of_mode(embedding.name, embedding.table_name, embedding.node.name)) is not None:
            return reason
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its table is {tensor.dtype.name.lower()}, not float32"
        if tensor.nbytes < LEAST_TABLE_BYTES:
            return f"{tensor.nbytes} bytes are too few to gain"
        if table is not None and any(use.node.op_type != "Gather" for use in table.uses()):
            return "its table is also read in fp32, so a quantized copy would only add to it"
        return None

    def check_globs(
        self,
        linears: Iterable[Linear],
        embeddings: Iterable[Embedding],
        layers: Iterable[str] = (),
        attention: Iterable[str] = (),
    ) -> None:
        """Refuse a glob that matches nothing, which is nearly always a slip of the pen.

        Args:
            layers: the globs of ``quantization.layers``.
            attention: names of attention layers whose inputs may be quantized.

        Raises:
            PreconditionError: naming the glob and the nearest name.
        """
        names: list[str] = []
        for linear in linears:
            names += [columns.name for columns in linear.columns] + [linear.weight_name, str(linear.node.name)]
        for embedding in embeddings:
            names += [embedding.name, embedding.table_name, str(embedding.node.name)]
        excludable = [*names, *attention]
        keys = {**dict.fromkeys(layers, "layers"), **dict.fromkeys(self.globs, "exclude")}
        for glob, key in keys.items():
            known = excludable if key == "exclude" else names
            if not any(fnmatchcase(name, glob) for name in known):
                match = nearest(glob, known) or (known[0] if known else None)
                remedy = (
                    f"A name that would match is '{match}'." if match else "Remove it: the graph has no such layer."
                )
                raise PreconditionError(
                    f"'{glob}' in quantization.{key} matches no layer that quantization could change.", remedy
                )

    def _glob(self, *names: str | None) -> str | None:
        return next((glob for glob in self.globs for name in names if name and fnmatchcase(name, glob)), None)

    def _only_feeds_outputs(self, value: ir.Value) -> bool:
        """Whether ``value`` goes to model outputs alone, with no normalization or product on the way.

        That is what pooler, classifier and language model heads have in common, whatever they are called. In
        SmolLM2-135M an INT8 head alone lowers the agreement of the most likely token from 0.850 to 0.823. A key or
        value projection that is also handed out as a cache feeds attention too, so it is no head.
        """
        seen, waiting, found = {value}, [value], False
        while waiting:
            current = waiting.pop()
            found = found or current in self._outputs
            for use in current.uses():
                if use.node.op_type in _MIXING or use.node.domain == "effc":
                    return False
                fresh = [output for output in use.node.outputs if output not in seen]
                seen.update(fresh)
                waiting += fresh
        return found


def is_gated(value: ir.Value | None) -> bool:
    """Whether ``value`` multiplies two activations of different origin.

    The two factors peak together now and then, thousands of times above the rest, and one scale for the tensor then
    rounds all else to nothing: in SmolLM2-135M INT8 everywhere takes the perplexity from 49 to 87, and to 52 where the
    products behind gates stay in fp32. An activation function spelled out, ``x * sigmoid(x)``, is not a gate.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return False
    one, other = (_origins(factor) for factor in node.inputs)
    return bool(one) and bool(other) and one != other and _width(node.inputs[0]) == _width(node.inputs[1])


def _origins(value: ir.Value | None) -> set[ir.Value]:
    """The values that ``value`` is computed from element by element, constants left out."""
    found: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is None or ir.convenience.get_const_tensor(current) is not None:
            continue
        node = current.producer()
        if node is not None and node.op_type in _ELEMENTWISE:
            waiting += node.inputs
        else:
            found.add(current)
    return found


def _width(value: ir.Value | None) -> object:
    return None if value is None or value.shape is None or not len(value.shape) else value.shape[-1]


def _is_plain(node: ir.Node) -> bool:
    """Whether a product is no more than ``x @ weight`` or ``x @ weight.T``, plus a constant bias ``[fan_out]``."""
    factors = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    turns = [node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")]
    if factors != (1.0, 1.0) or any(turns):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if bias is None else ir.convenience.get_const_tensor(bias)
    return bias is None or (tensor is not None and (len(tensor.shape) < 2 or tensor.shape[0] == 1))
