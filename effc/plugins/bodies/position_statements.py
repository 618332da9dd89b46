"""Writing ONNX text form from Python: one call for each node, names made unique, numbers turned into constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Value = str
"""Name of a value in the text."""

Operand = Value | int | float | bool | Sequence[int]
"""What a node takes: a value, a scalar (int64, float or bool), or a 1-D int64 list."""


@dataclass
class _Names:
    """What all graphs of one function share."""

    used: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Value] = field(default_factory=dict)
    constant_lines: list[str] = field(default_factory=list)

    def fresh(self, name: str) -> Value:
        number = self.used.get(name, 0)
        self.used[name] = number + 1
        return name if not number else f"{name}_{number}"


class Statements:
    """The statements of a graph; subgraphs see the values of the graphs around them.

    Constants are written once, in the outermost graph. Names may not collide with the function's inputs, which
    :meth:`reserve` takes out of use.
    """

    def __init__(self, names: _Names | None = None) -> None:
        self._names = names or _Names()
        self._lines: list[str] = []
        self._own: set[Value] = set()

    def reserve(self, *names: str) -> None:
        """Never give a new value one of these names."""
        for name in names:
            self._names.fresh(name)

    def __call__(
        self, operator: str, *operands: Operand | None, to: str = "", **attributes: int | float | str
    ) -> Value:
        """Add a node of one output and return its name.

        Args:
            operator: type, with its domain where that is not the default one.
            operands: inputs; None leaves an optional one out.
            to: what the output shall be called.
            attributes: of int or float type; strings are lists of ints as they are written: ``"[0, 2, 1]"``.
        """
        return self._node(operator, operands, to, 1, attributes)[0]

    def many(
        self, operator: str, outputs: int, *operands: Operand | None, to: str = "", **attributes: int | float | str
    ) -> list[Value]:
        """Add a node of several outputs."""
        return self._node(operator, operands, to, outputs, attributes)

    def _node(
        self,
        operator: str,
        operands: Sequence[Operand | None],
        to: str,
        outputs: int,
        attributes: Mapping[str, int | float | str],
    ) -> list[Value]:
        names = [self._names.fresh(to or operator.rpartition(".")[2].lower()) for _ in range(outputs)]
        self._own.update(names)
        inputs = ", ".join("" if operand is None else self.value(operand) for operand in operands)
        written = ", ".join(_attribute(key, value) for key, value in attributes.items())
        self._lines.append(f"{', '.join(names)} = {operator} {f'<{written}> ' if written else ''}({inputs})")
        return names

    def value(self, operand: Operand) -> Value:
        """The operand as the name of a value."""
        if isinstance(operand, str):
            return operand
        if isinstance(operand, bool):
            text = f"value: tensor = bool {{{int(operand)}}}"
        elif isinstance(operand, int):
            text = f"value: tensor = int64 {{{operand}}}"
        elif isinstance(operand, float):
            text = f"value: tensor = float {{{decimal(operand)}}}"
        else:
            text = f"value_ints: ints = [{', '.join(str(number) for number in operand)}]"
        if text not in self._names.constants:
            name = self._names.fresh("constant")
            self._names.constants[text] = name
            self._names.constant_lines.append(f"{name} = Constant <{text}> ()")
        return self._names.constants[text]

    def cast(self, value: Value, dtype: int, to: str = "") -> Value:
        """``value`` as another ``onnx.TensorProto`` type."""
        return self._node("Cast", (value,), to, 1, {"to": dtype})[0]

    def shape(self, *sizes: int | Value) -> Value:
        """A 1-D shape of numbers and of scalar int64 values."""
        if all(isinstance(size, int) for size in sizes):
            return self.value([size for size in sizes if isinstance(size, int)])
        pieces = [[size] if isinstance(size, int) else self("Unsqueeze", size, [0]) for size in sizes]
        return self("Concat", *pieces, to="shape", axis=0)

    def reshape(self, value: Value, *sizes: int | Value, to: str = "") -> Value:
        """``value`` in the shape of :meth:`shape`."""
        return self("Reshape", value, self.shape(*sizes), to=to)

    def size(self, value: Value, axis: int, to: str = "") -> Value:
        """Length of one axis as a scalar."""
        return self("Squeeze", self("Shape", value, start=axis, end=axis + 1), [0], to=to)

    def range(self, count: int | Value, to: str = "") -> Value:
        """``0 ... count - 1``."""
        return self("Range", 0, count, 1, to=to)

    def all_of(self, *flags: Value | None) -> Value | None:
        """Conjunction of those that are given; None if none is."""
        return self._join("And", flags)

    def any_of(self, *flags: Value | None) -> Value | None:
        """Disjunction of those that are given; None if none is."""
        return self._join("Or", flags)

    def _join(self, operator: str, flags: Sequence[Value | None]) -> Value | None:
        result: Value | None = None
        for flag in flags:
            if flag is not None:
                result = flag if result is None else self(operator, result, flag)
        return result

    def scan(
        self, sequences: Sequence[Value], body: Callable[[Statements, list[Value]], Sequence[Value]], to: str
    ) -> list[Value]:
        """Run ``body(statements, elements)`` for each element of the sequences' first axes; stack what it returns."""
        inner = Statements(self._names)
        elements = [self._names.fresh(f"{to}_element") for _ in sequences]
        results = [inner._output(result) for result in body(inner, elements)]
        outputs = [self._names.fresh(to) for _ in results]
        self._own.update(outputs)
        graph = inner._graph(f"{to}_step", elements, results)
        self._lines.append(
            f"{', '.join(outputs)} = Scan <num_scan_inputs: int = {len(elements)}, body: graph = {graph}> "
            f"({', '.join(sequences)})"
        )
        return outputs

    def choose(
        self, condition: Value, then: Callable[[Statements], Value], otherwise: Callable[[Statements], Value], to: str
    ) -> Value:
        """``then(statements)`` where the scalar condition holds, else ``otherwise(statements)``."""
        graphs = []
        for branch, make in (("then", then), ("else", otherwise)):
            inner = Statements(self._names)
            result = inner._output(make(inner))
            graphs.append(f"{branch}_branch: graph = {inner._graph(f'{to}_{branch}_branch', [], [result])}")
        output = self._names.fresh(to)
        self._own.add(output)
        self._lines.append(f"{output} = If <{', '.join(graphs)}> ({condition})")
        return output

    def text(self) -> str:
        """All statements of the outermost graph."""
        return "\n".join(["", *self._names.constant_lines, *self._lines, ""])

    def _output(self, value: Value) -> Value:
        """A graph may only return what one of its own nodes computes."""
        return value if value in self._own else self("Identity", value)

    def _graph(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> str:
        lines = "\n".join(self._lines)
        return f"{name} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{lines}\n}}"


def decimal(value: float) -> str:
    """A float as ONNX text form reads it: no exponent, nothing of its float32 value lost."""
    return np.format_float_positional(np.float32(value), trim="0")


def _attribute(key: str, value: int | float | str) -> str:
    if isinstance(value, str):
        return f"{key}: ints = {value}"
    return f"{key}: int = {value}" if isinstance(value, int) else f"{key}: float = {decimal(value)}"
