"""ONNX functions from the text of their bodies."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
from onnx import parser

from effc.plugins.bodies import OPSET
from effc.plugins.operator import DOMAIN


def parse_function(
    name: str,
    overload: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    text: str,
    *,
    attributes: Iterable[str] = (),
    domain: str = DOMAIN,
    contrib: bool = True,
) -> ir.Function:
    """Read a function; its nodes are named by what they compute, so that a profile shows whose body they belong to.

    Args:
        text: statements, one for each node.
        contrib: whether there may be operators of ONNX Runtime's own among them.
    """
    opsets = f'"": {OPSET}' + (', "com.microsoft": 1' if contrib else "")
    declared = f" <{', '.join(attributes)}>" if attributes else ""
    proto = parser.parse_function(
        f'<domain: "{domain}", overload: "{overload}", opset_import: [{opsets}]>\n'
        f"{name}{declared} ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{text}}}"
    )
    for node in proto.node:
        node.name = node.output[0]
        for attribute in node.attribute:
            _name_inner_nodes(attribute.g, proto.name)
    return ir.serde.deserialize_function(proto)


def _name_inner_nodes(graph: onnx.GraphProto, operator: str) -> None:
    """Nodes in branches and loops keep their names when the function is inlined, so these say where they come from."""
    for node in graph.node:
        node.name = f"{operator}_body/{node.output[0]}"
        for attribute in node.attribute:
            _name_inner_nodes(attribute.g, operator)
