"""Reading what a model adds to its scores: from T5's buckets, from a tensor alone, and from masks of a model's own."""

from __future__ import annotations

import pytest
import torch
from alibi_model import AlibiConfig, AlibiModel
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from effc.compiler.inputs import dynamic_axes
from effc.errors import PreconditionError
from effc.exporters.onnx_graph import export_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.rewrite_attention import RewriteAttention
from effc.plugins.function_body import is_attention
from effc.plugins.score_bias import NoDistanceBias, ScoreBias, read_score_bias
from effc.plugins.visibility import read_mask_tensor

LENGTH = 60
LOWEST = torch.finfo(torch.float32).min


def t5_attention(causal: bool, max_distance: int = 128) -> T5Attention:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, num_heads=4, relative_attention_max_distance=max_distance, is_decoder=causal)
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=causal)


def distances(length: int = LENGTH) -> torch.Tensor:
    return torch.arange(length)[None, :] - torch.arange(length)[:, None]


def of_self(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.diagonal(dim1=-2, dim2=-1)[..., None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("observed", "length"), [(LENGTH, 1000), (300, 700)])
def test_the_bias_of_t5_holds_at_lengths_that_were_not_observed(causal, observed, length):
    attention = t5_attention(causal)
    with torch.no_grad():
        bias = read_score_bias(attention.compute_bias(observed, observed), causal, [torch.nn.Linear(1, 1), attention])
        expected = of_self(attention.compute_bias(length, length)[0])
    result = bias.added(length, length)
    if causal:
        result, expected = result.tril(), expected.tril()
    assert torch.allclose(result, expected, atol=1e-6)
    # The last bucket of T5 begins before its maximum distance.
    assert bias.table.shape[-1] // 2 < 128
    assert bias.extras().keys() == {"distance_bias"}


def test_without_the_models_function_the_bias_must_be_constant_over_half_of_what_is_seen():
    table = torch.randn(2, 31)
    near = ScoreBias(table=table).added(LENGTH, LENGTH)[None]
    assert torch.allclose(read_score_bias(near, False).added(200, 200), of_self(ScoreBias(table=table).added(200, 200)))
    with pytest.raises(NoDistanceBias, match="neither becomes constant"):
        read_score_bias(near[..., :25, :25], False)


@pytest.mark.parametrize("by_key", [False, True])
def test_slopes_are_read_however_a_row_is_shifted(by_key):
    slopes = torch.tensor([0.5, 0.25, -0.125])
    position = torch.arange(LENGTH)[None, :].expand(LENGTH, -1) if by_key else distances()
    bias = read_score_bias((slopes[:, None, None] * position)[None], True)
    assert torch.allclose(bias.slope, slopes)
    assert bias.extras().keys() == {"distance_slope"}


def test_a_slope_in_both_directions_is_refused():
    with pytest.raises(NoDistanceBias, match="neither becomes constant nor grows linearly"):
        read_score_bias(-0.5 * distances().abs()[None, None].float(), False)


def test_what_is_no_function_of_the_distance_is_refused():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(1, 2, LENGTH, LENGTH, generator=generator)
    with pytest.raises(NoDistanceBias):
        read_score_bias(square, False)
    # Constant far away and Toeplitz but for one pair.
    table = ScoreBias(table=torch.randn(2, 11, generator=generator)).added(LENGTH, LENGTH)[None]
    table[0, 1, 30, 28] += 0.01
    with pytest.raises(NoDistanceBias, match="distance alone"):
        read_score_bias(table, False)
    with pytest.raises(NoDistanceBias, match="depends on the input"):
        read_score_bias(torch.cat((square, 2 * square)), False)
    with pytest.raises(NoDistanceBias, match="between two texts"):
        read_score_bias(square[..., :30], False)


def test_nothing_added_is_no_bias():
    assert read_score_bias(torch.zeros(1, 2, 5, 9), False) is None


def own_mask(lengths: list[int], left: int | None, right: int | None, slopes: list[float] | None = None):
    longest = max(lengths)
    padding = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    far = distances(longest)
    visible = torch.ones_like(far, dtype=torch.bool)
    visible &= far >= -left if left is not None else visible
    visible &= far <= right if right is not None else visible
    added = torch.tensor(slopes or [0.0])[:, None, None] * far
    return torch.where(visible & padding[:, None, None, :], added[None], LOWEST), padding.long()


@pytest.mark.parametrize(
    ("left", "right", "causal", "pattern"),
    [
        (None, None, False, "dense"),
        (None, 0, True, "dense"),
        (6, 0, True, "local:7"),
        (4, 4, False, "local:8"),
        (2, 5, False, "local:2:5"),
    ],
)
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_mask_of_the_models_own_reads_back_as_pattern_and_padding(left, right, causal, pattern, kind):
    mask, padding = own_mask([20, 13, 1], left, right)
    visibility, added = read_mask_tensor(mask if kind == "float" else mask == 0, padding)
    assert (visibility.causal, str(visibility.pattern), visibility.unsupported) == (causal, pattern, None)
    assert added is None


def test_slopes_in_a_mask_of_the_models_own_are_told_apart_from_what_it_hides():
    mask, padding = own_mask([20, 13, 5], None, 0, [0.5, 0.1])
    visibility, added = read_mask_tensor(mask, padding)
    assert (visibility.causal, str(visibility.pattern)) == (True, "dense")
    assert torch.allclose(read_score_bias(added, True).slope, torch.tensor([0.5, 0.1]))


def test_masks_of_the_models_own_that_are_no_pattern_are_refused():
    mask, padding = own_mask([20, 13], None, 0)
    blocks = torch.where((torch.arange(20)[:, None] // 5 == torch.arange(20) // 5)[None, None], 0.0, LOWEST)
    assert "no window" in read_mask_tensor(blocks)[0].unsupported
    other = mask.clone()
    other[1, 0, 8, 3] = LOWEST
    assert "no pattern and padding" in read_mask_tensor(other, padding)[0].unsupported
    heads = mask.repeat(1, 2, 1, 1)
    heads[:, 1, 5, 2] = LOWEST
    assert "every head" in read_mask_tensor(heads, padding)[0].unsupported
    other = mask.clone()
    other[1, 0, 8, 3] = 0.5
    assert "depends on the input" in read_mask_tensor(other, padding)[0].unsupported
    assert "two texts" in read_mask_tensor(mask[..., :5, :], padding)[0].unsupported


def alibi(by_key: bool) -> AlibiModel:
    torch.manual_seed(0)
    model = AlibiModel(AlibiConfig(by_key=by_key))
    with torch.no_grad():
        model.layers[0].qkv.weight.normal_(std=0.3)
        model.layers[1].qkv.weight.normal_(std=0.3)
        model.embeddings.weight.normal_()
    return model.train(False).requires_grad_(False)


def texts(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(2, 100, real.shape, generator=generator) * real, "attention_mask": real.long()}


@pytest.mark.parametrize("by_key", [False, True])
def test_a_model_with_alibi_in_its_own_mask_is_rewritten(by_key):
    model, inputs = alibi(by_key), texts([50, 31, 4])
    with torch.no_grad():
        untouched = model(**inputs).last_hidden_state
    rewriting = RewriteAttention(AttentionSection(pattern="local:100"), inputs)
    rewriting.run(model)
    assert [str(layer.bias) for layer, _, _ in rewriting.layers] == [
        "bias that grows linearly with the distance (ALiBi)"
    ] * 2
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        result = model(**inputs).last_hidden_state
    assert torch.allclose(result[real], untouched[real], atol=1e-4)
    narrow = RewriteAttention(AttentionSection(pattern="local:5"), inputs)
    narrow.run(model.train(False))
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).last_hidden_state[real], untouched[real], atol=1e-2)


def test_the_mask_that_the_model_builds_is_not_in_the_graph():
    model, inputs = alibi(False), texts([24, 17])
    RewriteAttention(AttentionSection(pattern="local:8"), inputs).run(model)
    graph = export_onnx(model, inputs, dynamic_axes(inputs))
    nodes = [node for node in graph.graph if is_attention(node)]
    assert len(nodes) == 2
    # query, key, value, mask, marks, table, slopes
    assert [value is not None for value in nodes[0].inputs] == [True, True, True, True, False, False, True]
    sizes = [value.shape for node in graph.graph for value in node.outputs if value.shape is not None]
    assert all(sum(not isinstance(size, int) for size in shape) <= 2 for shape in sizes)


def test_a_form_that_cannot_add_slopes_is_refused():
    with pytest.raises(PreconditionError, match="ALiBi"):
        RewriteAttention(AttentionSection(pattern="linear:elu"), texts([20, 5])).run(alibi(False))
