"""Keys and values kept in fewer bits: every step equals attention to rounded keys and values, and memory shrinks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import torch
from generation_cases import HEAD_DIM, KV_HEADS, SCALE, ToyModel, prompts

import effc
from effc import cli
from effc.compiler.generation_memory import Memory
from effc.compiler.generation_rows import JointRows
from effc.compiler.recipe import build_recipe
from effc.compiler.report_command import command_line
from effc.errors import UsageError
from effc.plugins.forms.registry import parse_form
from effc.plugins.reference import attend

SLOPE = {"distance_slope": np.array([0.5, 0.25, 0.1, 0.05], np.float32)}
FORMS = {"window": ToyModel("local:6|sinks:2"), "dense": ToyModel("dense"), "alibi": ToyModel("dense", extras=SLOPE)}


def rounded(states: torch.Tensor, kept_in: str) -> torch.Tensor:
    """States ``[batch, heads, length, head_dim]`` as the cache gives them back."""
    if kept_in == "fp16":
        return states.float().half().double()
    scale = (states.float().abs().amax(dim=-1, keepdim=True) * np.float32(1 / 127)).clamp_min(1e-12)
    return (states.float() / scale).round().double() * scale.double()


def step_logits(model: ToyModel, tokens: np.ndarray, mask: np.ndarray, kept_in: str) -> np.ndarray:
    """Logits of the last token in float64: it sees itself as it is, and what came before as it was kept."""
    states = {
        name: torch.from_numpy(model.tables[name][tokens]).double().unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for name in ("query", "key", "value")
    }
    for name in ("key", "value"):
        past, own = states[name][:, :, :-1], states[name][:, :, -1:]
        states[name] = torch.cat([rounded(past, kept_in), own], dim=2)
    attended = attend(
        parse_form(model.form),
        query=states["query"][:, :, -1:],
        key=states["key"],
        value=states["value"],
        scale=SCALE,
        causal=True,
        key_mask=torch.from_numpy(mask),
        extras={name: torch.from_numpy(array).double() for name, array in model.extras.items()},
    )
    return (attended.transpose(1, 2).flatten(2) @ torch.from_numpy(model.tables["head"]).double()).numpy()[:, -1]


@pytest.mark.parametrize("kept_in", ["fp16", "int8"])
@pytest.mark.parametrize("name", FORMS)
def test_every_step_sees_what_was_kept(name: str, kept_in: str, tmp_path: Path) -> None:
    model, steps = FORMS[name], 17
    generator, record = model.generator(tmp_path, kept_in)
    assert {layer.kept_in for layer in record.layers} == {kept_in}
    tokens, mask = prompts([9 + steps, 3 + steps], 5)
    memory = Memory(record, tokens[:, :-steps], mask[:, :-steps])
    # A prompt is attended to before it is kept.
    whole = model.logits(tokens[:, :-steps], mask[:, :-steps])[:, -1]
    np.testing.assert_allclose(generator.prefill(memory), whole, rtol=0, atol=5e-6 * np.abs(whole).max())
    for place in range(tokens.shape[1] - steps, tokens.shape[1]):
        expected = step_logits(model, tokens[:, : place + 1], mask[:, : place + 1], kept_in)
        found = generator.step(memory, tokens[:, place])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kept_in", "bytes_per_head"), [("fp32", 64), ("fp16", 32), ("int8", 24)])
def test_memory_is_that_of_the_type(kept_in: str, bytes_per_head: int, tmp_path: Path) -> None:
    generator, record = FORMS["window"].generator(tmp_path, kept_in)
    memory = Memory(record, *prompts([30], 0))
    generator.prefill(memory)
    assert memory.nbytes == 7 * KV_HEADS * bytes_per_head
    memory.fill_with_noise(0)
    assert np.isfinite(generator.step(memory, np.array([3]))).all()


@pytest.mark.parametrize("kept_in", ["fp16", "int8"])
def test_texts_written_together_are_those_written_alone(kept_in: str, tmp_path: Path) -> None:
    generator, record = FORMS["window"].generator(tmp_path, kept_in)
    texts = [prompts([length], length)[0][0] for length in (4, 11)]
    rows = JointRows(generator, 4)
    last = [rows.add(text) for text in texts]
    memories = [Memory(record, text[None], np.ones((1, len(text)), bool)) for text in texts]
    alone = [generator.prefill(memory)[0] for memory in memories]
    for _ in range(9):
        np.testing.assert_allclose(np.stack(last), np.stack(alone), rtol=0, atol=1e-5 * np.abs(alone).max())
        new = [int(logits.argmax()) for logits in alone]
        last = list(rows.step(new))
        alone = [generator.step(memory, np.array([token]))[0] for memory, token in zip(memories, new, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_an_artifact_writes_from_it(tmp_path: Path) -> None:
    source = tiny_checkpoints.save_lively(tmp_path / "llama", "LlamaForCausalLM")
    plain = {"bench": {"enabled": False}, "verify": {"samples": 1}}
    effc.compile(source, attention="local:16|sinks:2", output=tmp_path / "fp32", **plain)
    quantization = {"kv_cache": "int8"}
    made = effc.compile(
        source, attention="local:16|sinks:2", quantization=quantization, output=tmp_path / "int8", **plain
    )
    assert made.manifest.generation is not None
    assert {layer.kept_in for layer in made.manifest.generation.layers} == {"int8"}
    error = next(step for step in made.manifest.passes if step.name == "generation").metrics["relative_error_to_torch"]
    assert 1e-5 < error < 0.05
    ids = (np.arange(40) % 25 + 5)[None]
    written = [
        effc.load(tmp_path / name).generate(input_ids=ids, max_new_tokens=12, eos_token_id=[])
        for name in ("fp32", "int8")
    ]
    assert written[1].shape == written[0].shape


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("BertModel", {}, "kv_cache int8 is for models that write text"),
        ("LlamaForCausalLM", {"generation": {"enabled": False}}, "with a generating graph"),
        ("LlamaForCausalLM", {"attention": "hierarchical:16"}, "hierarchical:16:2 does not"),
    ],
)
def test_where_it_does_not_apply_it_is_refused(kind: str, options: dict, message: str, tmp_path: Path) -> None:
    source = tiny_checkpoints.save_lively(tmp_path / kind, kind)
    with pytest.raises(UsageError, match=message):
        effc.compile(
            source, quantization={"kv_cache": "int8"}, output=tmp_path / "out", bench={"enabled": False}, **options
        )
    assert not (tmp_path / "out").exists()


def test_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from effc.compiler import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe) or (_ for _ in ()).throw(
        UsageError("seen", "enough")
    ))  # fmt: skip
    source = tiny_checkpoints.save_lively(tmp_path / "llama", "LlamaForCausalLM")
    with pytest.raises(SystemExit):
        cli.main(["compile", str(source), "--quant-kv-cache=int8", "-o", str(tmp_path / "out")])
    assert seen[0].quantization.kv_cache == "int8" and not seen[0].quantization.active
    flags = command_line(build_recipe({"quantization": {"kv_cache": "fp16"}}).model_dump(mode="json"), "model")
    assert "--quant-kv-cache=fp16" in flags
