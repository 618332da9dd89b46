"""All ranks of a divided graph as one graph, so that a CPU can show that together they compute what the whole does."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effc.exporters.shard_graph import COLLECTIVE


def join_ranks(models: Sequence[ir.Model]) -> ir.Model:
    """The ranks side by side, with a sum in the place of each collective; outputs are those of the first rank.

    Args:
        models: of all ranks, in order; they are used up.
    """
    first = models[0]
    inputs = list(first.graph.inputs)
    first.graph.inputs.clear()
    whole = ir.Graph(inputs, [], nodes=[], opset_imports=first.graph.opset_imports, name=first.graph.name)
    given = {value.name: value for value in whole.inputs}
    partial: list[list[ir.Value]] = []
    results: list[list[ir.Value]] = []
    functions = {key: function for model in models for key, function in model.functions.items()}
    for rank, model in enumerate(models):
        graph = model.graph
        if rank:
            for value in graph.inputs:
                ir.convenience.replace_all_uses_with(value, given[value.name])
        if rank == 0:
            outputs = list(graph.outputs)
        graph.outputs.clear()
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            value.name = f"rank{rank}/{name}"
            whole.register_initializer(value)
        nodes = list(graph)
        graph.remove(nodes)
        collectives = [node for node in nodes if node.op_type == COLLECTIVE]
        partial.append([_input(node) for node in collectives])
        results.append([node.outputs[0] for node in collectives])
        for node in nodes:
            if node in collectives:
                continue
            node.name = f"rank{rank}/{node.name}"
            for value in node.outputs:
                if value not in outputs:
                    value.name = f"rank{rank}/{value.name}"
            whole.append(node)
    for number, parts in enumerate(zip(*partial, strict=True)):
        add = ir.node("Sum", list(parts), name=f"collective{number}")
        add.outputs[0].type, add.outputs[0].shape = parts[0].type, parts[0].shape
        whole.append(add)
        for rank in range(len(models)):
            result = results[rank][number]
            if result in outputs:
                outputs[outputs.index(result)] = add.outputs[0]
                add.outputs[0].name, result.name = result.name, None
            ir.convenience.replace_all_uses_with(result, add.outputs[0])
    whole.outputs.extend(outputs)
    whole.sort()
    return ir.Model(whole, ir_version=first.ir_version, functions=list(functions.values()))


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
