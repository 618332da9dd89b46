"""Rows of one sequence, ``[length, heads * head_dim]``, cut into chunks and heads, as ONNX statements.

For bodies that walk over the batch with a ``Scan`` and over each sequence with another: chunks are taken without a copy
of the whole, and what is computed of them stays in a core's second-level cache.
"""

from __future__ import annotations

import numpy as np

from effc.plugins.operator import AttentionGeometry


def literal(value: float) -> str:
    """A float as ONNX text."""
    return np.format_float_positional(np.float32(value), trim="0")


def row_constants(g: AttentionGeometry) -> str:
    """What the statements of this module share."""
    groups = g.num_heads // g.kv_heads
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    n0 = Constant <value: tensor = int64 {{0}}> ()
    n1 = Constant <value: tensor = int64 {{1}}> ()
    float_zero = Constant <value: tensor = float {{0.0}}> ()
    float_one = Constant <value: tensor = float {{1.0}}> ()
    query_length_1d = Shape <start: int = 1, end: int = 2> (query)
    query_length = Squeeze (query_length_1d, zero)
    last_query = Sub (query_length, n1)
    key_length_1d = Shape <start: int = 1, end: int = 2> (key)
    key_length = Squeeze (key_length_1d, zero)
    kv_shape = Constant <value_ints: ints = [-1, {g.kv_heads}, {g.head_dim}]> ()
    grouped_shape = Constant <value_ints: ints = [-1, {g.kv_heads}, {groups}, {g.head_dim}]> ()
    unfolded_shape = Constant <value_ints: ints = [{g.kv_heads}, {groups}, -1, {g.head_dim}]> ()
    joined_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * g.head_dim}]> ()
    """


def chunk_rows(chunk: int, result: str) -> str:
    """Define ``result [chunks, chunk]``: indices of the queries; the last one again where there are no more."""
    return f"""
    {result}_chunk = Constant <value: tensor = int64 {{{chunk}}}> ()
    {result}_starts = Range (n0, query_length, {result}_chunk)
    {result}_places = Range (n0, {result}_chunk, n1)
    {result}_columns = Unsqueeze ({result}_starts, one)
    {result}_unclipped = Add ({result}_columns, {result}_places)
    {result} = Min ({result}_unclipped, last_query)
    """


def split_queries(g: AttentionGeometry, source: str, target: str) -> str:
    """From rows to ``[heads, n, head_dim]``, or ``[kv_heads, groups, n, head_dim]`` where queries are grouped."""
    if g.num_heads == g.kv_heads:
        return f"""
        {target}_split = Reshape ({source}, kv_shape)
        {target} = Transpose <perm: ints = [1, 0, 2]> ({target}_split)
        """
    return f"""
        {target}_split = Reshape ({source}, grouped_shape)
        {target} = Transpose <perm: ints = [1, 2, 0, 3]> ({target}_split)
    """


def fold_groups(g: AttentionGeometry, source: str, target: str, width: int) -> str:
    """From what :func:`split_queries` gives to ``[kv_heads, groups * n, width]``."""
    if g.num_heads == g.kv_heads:
        return f"{target} = Identity ({source})"
    return f"""
        {target}_shape = Constant <value_ints: ints = [{g.kv_heads}, -1, {width}]> ()
        {target} = Reshape ({source}, {target}_shape)
    """


def split_keys(source: str, target: str) -> str:
    """From rows to ``[kv_heads, n, head_dim]``."""
    return f"""
        {target}_split = Reshape ({source}, kv_shape)
        {target} = Transpose <perm: ints = [1, 0, 2]> ({target}_split)
    """


def rows_by_token(g: AttentionGeometry, source: str, target: str) -> str:
    """From ``[kv_heads, groups * n, head_dim]`` to ``[n, ..., head_dim]`` with the heads, in order, between."""
    if g.num_heads == g.kv_heads:
        return f"{target} = Transpose <perm: ints = [1, 0, 2]> ({source})"
    return f"""
        {target}_grouped = Reshape ({source}, unfolded_shape)
        {target} = Transpose <perm: ints = [2, 0, 1, 3]> ({target}_grouped)
    """


def each_sequence(inputs: dict[str, str], statements: str, result: str) -> str:
    """Define ``result [batch, query_length, heads * head_dim]``: ``statements`` run over each sequence of the batch.

    Args:
        inputs: tensors with a batch axis, by the name that one sequence of them has within ``statements``.
        statements: define ``sequence_output [chunks, chunk, ..., head_dim]``.
    """
    return f"""
    sequences = Scan <num_scan_inputs: int = {len(inputs)}, body: graph = sequence (
        {", ".join(inputs)}
    ) => (sequence_output) {{
        {statements}
    }}> ({", ".join(inputs.values())})
    joined = Reshape (sequences, joined_shape)
    {result} = Slice (joined, zero, query_length_1d, one)
    """
