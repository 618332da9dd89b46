"""Reading a transformers mask function back as a pattern."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from effc.plugins.visibility import Visibility, read_mask_function


def seen(mask_function) -> tuple[bool, str]:
    visibility = read_mask_function(mask_function)
    assert visibility.unsupported is None
    return visibility.causal, str(visibility.pattern)


def test_dense_masks():
    assert seen(masking_utils.causal_mask_function) == (True, "dense")
    assert seen(masking_utils.bidirectional_mask_function) == (False, "dense")


@pytest.mark.parametrize("window", [1, 2, 7, 1024])
def test_a_causal_window_counts_the_token_itself(window):
    assert seen(masking_utils.sliding_window_causal_mask_function(window)) == (True, f"local:{window}")


@pytest.mark.parametrize("reach", [1, 5, 64])
def test_a_bidirectional_window_is_twice_its_reach(reach):
    assert seen(masking_utils.sliding_window_bidirectional_mask_function(reach)) == (False, f"local:{2 * reach}")


@pytest.mark.parametrize("window", [1, 6, 33])
def test_a_window_reads_back_as_the_mask_it_came_from(window):
    function = masking_utils.sliding_window_causal_mask_function(window)
    position = torch.arange(50)
    zero = torch.zeros((), dtype=torch.long)
    own = function(zero, zero, position[:, None], position[None, :])
    visibility = read_mask_function(function)
    assert (visibility.pattern.mask(50, 50, visibility.causal) == own.numpy()).all()


def test_offsets_do_not_matter():
    shifted = masking_utils.add_offsets_to_mask_function(masking_utils.sliding_window_causal_mask_function(9), 17, 17)
    assert seen(shifted) == (True, "local:9")


def refused(mask_function) -> str:
    visibility: Visibility = read_mask_function(mask_function)
    assert visibility.unsupported is not None
    return visibility.unsupported


@pytest.mark.parametrize("size", [15, 16, 8192])
def test_chunked_attention_is_refused(size):
    chunked = masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    assert "absolute positions" in refused(chunked)


def test_packed_sequences_are_refused():
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]]))
    assert "depends on the input" in refused(masking_utils.and_masks(masking_utils.causal_mask_function, packed))


def test_image_blocks_are_refused():
    blocks = masking_utils.blockwise_overlay(torch.tensor([[0, 0, -1, -1]]))
    assert "depends on the input" in refused(masking_utils.or_masks(masking_utils.causal_mask_function, blocks))


def test_an_uneven_window_says_both_reaches():
    assert seen(lambda b, h, q, k: (k <= q + 3) & (k >= q - 5)) == (False, "local:5:3")


def test_gaps_and_windows_open_on_one_side_are_refused():
    assert "one side" in refused(lambda b, h, q, k: k <= q + 3)
    assert "gaps" in refused(lambda b, h, q, k: (q - k) % 2 == 0)


def test_a_function_that_hides_everything_is_refused():
    assert refused(lambda b, h, q, k: torch.zeros_like(q + k, dtype=torch.bool))


@pytest.mark.parametrize("back", [3, 40])
def test_seeing_only_the_past_without_the_token_itself_is_refused(back):
    assert refused(lambda b, h, q, k: (k < q) & (k > q - back))


def test_a_mask_that_is_no_pattern_is_marked_unreadable():
    gaps = read_mask_function(lambda batch, head, query, key: (query - key) % 2 == 0)
    assert gaps.unsupported
    assert not gaps.readable
    assert read_mask_function(lambda batch, head, query, key: key <= query).readable
