"""Every query of a sequence attends to the same few keys: what low-rank forms end in, as ONNX statements."""

from __future__ import annotations

from effc.plugins.bodies.sequence_rows import chunk_rows, fold_groups, rows_by_token, split_queries
from effc.plugins.operator import AttentionGeometry

HIDDEN = -1e30
# Scores of one chunk, or the queries they come from, in bytes: they fit into a second-level cache.
_CHUNK_BYTES = 3 << 19
_LARGEST_CHUNK = 512


def chunk_length(g: AttentionGeometry, few: int) -> int:
    """Queries, or keys, of one chunk whose scores with ``few`` others stay in cache."""
    width = g.num_heads * max(few, g.head_dim)
    return max(32, min(_LARGEST_CHUNK, _CHUNK_BYTES // (4 * width) // 32 * 32))


def attend_to_few(g: AttentionGeometry, few: int, values_per_head: bool, result: str) -> str:
    """Define ``result [chunks, chunk, ..., head_dim]``.

    Expects ``few_keys_transposed [kv_heads, head_dim, few]`` with the scale of the scores in it, ``few_bias [1, few]``
    (``HIDDEN`` hides a key) and ``few_values [kv_heads, few, head_dim]``, or ``[heads, ...]`` if ``values_per_head``.
    """
    fold_values = values_per_head and g.num_heads != g.kv_heads
    unfold = f"""
            weights_shape = Constant <value_ints: ints = [{g.num_heads}, -1, {few}]> ()
            weights_by_head = Reshape (weights, weights_shape)
            attended_by_head = MatMul (weights_by_head, few_values)
            {fold_groups(g, "attended_by_head", "attended", g.head_dim)}
    """
    return f"""
        {chunk_rows(chunk_length(g, few), "query_rows")}
        {result} = Scan <num_scan_inputs: int = 1, body: graph = queries_of_chunk (chunk_rows) => (chunk_output) {{
            query_chunk = Gather <axis: int = 0> (query_sequence, chunk_rows)
            {split_queries(g, "query_chunk", "query_heads")}
            {fold_groups(g, "query_heads", "queries", g.head_dim)}
            scores = MatMul (queries, few_keys_transposed)
            biased = Add (scores, few_bias)
            weights = Softmax <axis: int = -1> (biased)
            {unfold if fold_values else "attended = MatMul (weights, few_values)"}
            {rows_by_token(g, "attended", "chunk_output")}
        }}> (query_rows)
    """
