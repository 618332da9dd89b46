"""Solving with the small matrices of Nyström attention, as ONNX statements.

Both define ``solved [heads, m, head_dim]`` from ``matrix [heads, m, m]``, whose rows sum to 1 or 0, and
``right [heads, m, head_dim]``.
"""

from __future__ import annotations

from effc.plugins.bodies.sequence_rows import literal
from effc.plugins.forms.low_rank import NEWTON_ITERATIONS, RIDGE
from effc.plugins.operator import AttentionGeometry

# A pivot is at least RIDGE but for rounding.
_SMALLEST_PIVOT = RIDGE / 10
_SMALLEST = 1.1754944e-38


def newton(size: int) -> str:
    """The third-order iteration towards ``pinv(matrix)`` that Nyströmformer uses (Xiong et al., 2021)."""
    text = f"""
        {_identity(size)}
        seven_identity = Mul (identity, seven)
        fifteen_identity = Mul (identity, fifteen)
        thirteen_identity = Mul (identity, thirteen)
        matrix_transposed = Transpose <perm: ints = [0, 2, 1]> (matrix)
        column_sums = ReduceSum <keepdims: int = 1> (matrix, one)
        largest_column = ReduceMax <keepdims: int = 1> (column_sums, two)
        row_sums = ReduceSum <keepdims: int = 1> (matrix, two)
        largest_row = ReduceMax <keepdims: int = 1> (row_sums, one)
        norms = Mul (largest_column, largest_row)
        norms_positive = Clip (norms, smallest)
        inverse0 = Div (matrix_transposed, norms_positive)
    """
    for step in range(NEWTON_ITERATIONS):
        text += f"""
        product{step} = MatMul (matrix, inverse{step})
        seven_less{step} = Sub (seven_identity, product{step})
        inner_product{step} = MatMul (product{step}, seven_less{step})
        inner{step} = Sub (fifteen_identity, inner_product{step})
        outer_product{step} = MatMul (product{step}, inner{step})
        outer{step} = Sub (thirteen_identity, outer_product{step})
        next{step} = MatMul (inverse{step}, outer{step})
        inverse{step + 1} = Mul (next{step}, quarter)
        """
    return text + f"solved = MatMul (inverse{NEWTON_ITERATIONS}, right)"


def newton_constants() -> str:
    """What :func:`newton` needs from outside the loop over sequences."""
    values = {"seven": 7.0, "fifteen": 15.0, "thirteen": 13.0, "quarter": 0.25, "smallest": _SMALLEST}
    return "\n".join(f"{name} = Constant <value: tensor = float {{{literal(v)}}}> ()" for name, v in values.items())


def cholesky(g: AttentionGeometry, size: int) -> str:
    """``(matrix^T matrix + RIDGE)^-1 matrix^T right``: a column of the Cholesky factor per step, then back again.

    Each step takes its column out of the matrix and out of the right-hand side, so that the first pass also solves with
    the lower factor.
    """
    heads, dim = g.num_heads, g.head_dim
    return f"""
        {_identity(size)}
        ridge_diagonal = Mul (identity, ridge)
        matrix_transposed = Transpose <perm: ints = [0, 2, 1]> (matrix)
        normal = MatMul (matrix_transposed, matrix)
        normal_ridged = Add (normal, ridge_diagonal)
        normal_right = MatMul (matrix_transposed, right)
        pivots = Range (n0, cholesky_size, n1)
        eliminated, solved_forward, factor, forward = Scan <
            num_scan_inputs: int = 1, body: graph = eliminate (
                remaining, remaining_right, pivot
            ) => (next_remaining, next_right, factor_column, forward_row) {{
                pivot_1d = Unsqueeze (pivot, zero)
                whole_column = Gather <axis: int = 2> (remaining, pivot_1d)
                diagonal = Gather <axis: int = 1> (whole_column, pivot_1d)
                diagonal_positive = Clip (diagonal, smallest_pivot)
                root = Sqrt (diagonal_positive)
                column_scaled = Div (whole_column, root)
                not_above_bool = GreaterOrEqual (cholesky_places, pivot)
                not_above = Cast <to: int = 1> (not_above_bool)
                factor_column = Mul (column_scaled, not_above)
                right_row = Gather <axis: int = 1> (remaining_right, pivot_1d)
                forward_row = Div (right_row, root)
                factor_row = Transpose <perm: ints = [0, 2, 1]> (factor_column)
                taken = MatMul (factor_column, factor_row)
                next_remaining = Sub (remaining, taken)
                taken_right = MatMul (factor_column, forward_row)
                next_right = Sub (remaining_right, taken_right)
            }}
        > (normal_ridged, normal_right, pivots)
        nothing_shape = Constant <value_ints: ints = [{heads}, {size}, {dim}]> ()
        nothing = Expand (float_zero, nothing_shape)
        solved = Scan <
            num_scan_inputs: int = 3, scan_input_directions: ints = [1, 1, 1], body: graph = substitute (
                known, column, row, back_pivot
            ) => (next_known) {{
                back_pivot_1d = Unsqueeze (back_pivot, zero)
                column_transposed = Transpose <perm: ints = [0, 2, 1]> (column)
                from_known = MatMul (column_transposed, known)
                row_left = Sub (row, from_known)
                column_root = Gather <axis: int = 1> (column, back_pivot_1d)
                found = Div (row_left, column_root)
                here_bool = Equal (cholesky_places, back_pivot)
                here = Cast <to: int = 1> (here_bool)
                found_here = Mul (found, here)
                next_known = Add (known, found_here)
            }}
        > (nothing, factor, forward, pivots)
    """


def cholesky_constants(size: int) -> str:
    """What :func:`cholesky` needs from outside the loop over sequences."""
    return f"""
    ridge = Constant <value: tensor = float {{{literal(RIDGE)}}}> ()
    smallest_pivot = Constant <value: tensor = float {{{literal(_SMALLEST_PIVOT)}}}> ()
    cholesky_size = Constant <value: tensor = int64 {{{size}}}> ()
    cholesky_row = Range (n0, cholesky_size, n1)
    cholesky_places = Unsqueeze (cholesky_row, one)
    """


def _identity(size: int) -> str:
    return f"""
        square_shape = Constant <value_ints: ints = [{size}, {size}]> ()
        square = ConstantOfShape (square_shape)
        identity = EyeLike (square)
    """
