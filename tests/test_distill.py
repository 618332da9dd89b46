"""Distillation: what is trained, by which losses, within which budget, and how a killed run goes on."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, BertModel, PreTrainedModel, TrainerCallback

import effc
from effc.compiler.data import Sample
from effc.compiler.distill_data import material_of
from effc.compiler.distill_lesson import Imitation
from effc.compiler.distill_losses import Seen, terms_of
from effc.compiler.distill_models import keep_zeros
from effc.errors import DataError, MissingDependencyError, OutputError, PassFailedError, PreconditionError, UsageError
from effc.passes.distill_settings import RecoverSection
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.registry import parse_form

STEPS: dict[str, Any] = {"steps": 12, "batch": 8, "evaluate_every": 4, "learning_rate": 5e-3, "warmup": 2}


def texts(count: int = 60, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = tiny_checkpoints.WORDS[:20]
    return [" ".join(generator.choices(words, k=generator.randint(5, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoints.save_lively(path / "teacher", "BertModel")
    tiny_checkpoints.save(path / "student", "BertModel", with_tokenizer=True)
    (path / "texts.txt").write_text("\n".join(texts()))
    return path


def pair(kind: str = "BertModel") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher whose weights are larger, so that there is something to learn."""
    student, teacher = tiny_checkpoints.model(kind), tiny_checkpoints.model(kind)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return student, teacher


def trained(student: PreTrainedModel, teacher: PreTrainedModel, data: Any = None, **settings: Any) -> effc.Distilled:
    tokenizer = tiny_checkpoints.tokenizer()
    return effc.distill(student, teacher, data or texts(), tokenizer=tokenizer, **(STEPS | settings))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_learns_from_another_and_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    done = effc.distill(
        folder / "student",
        folder / "teacher",
        folder / "texts.txt",
        output=tmp_path / "out",
        progress=lambda *what: told.append(what),
        **STEPS,
    )
    assert done.run.after < 0.6 * done.run.before
    loaded = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(loaded, BertModel)
    assert same(weights(loaded), weights(done.model))
    record = json.loads((tmp_path / "out" / "distill.json").read_text())["run"]
    assert record["stages"][0]["steps"] == STEPS["steps"]
    assert [row[0] for row in record["stages"][0]["held_out"]] == [0, 4, 8, 12]
    assert not (tmp_path / "out.run").exists()
    what, part, whole = told[-1]
    assert part == whole and "loss" in what and "left" in what


def test_functions_of_the_user_are_losses_and_callbacks() -> None:
    student, teacher = pair()
    steps: list[int] = []

    def last(own: Seen, wanted: Seen, batch: Any) -> torch.Tensor:
        assert own.hidden_states and own.attention.keys() == wanted.attention.keys() != set()
        assert own.mask is not None and own.mask.shape == batch["input_ids"].shape
        return (own.outputs["last_hidden_state"] - wanted.outputs["last_hidden_state"]).square().mean()

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    done = trained(student, teacher, losses=["hidden:0.5", (last, 2.0)], callbacks=[Count()], steps=5)
    assert steps == [1, 2, 3, 4, 5]
    assert done.run.after < done.run.before
    # The teacher is what it was, and both compute attention as before.
    assert same(weights(teacher), weights(pair()[1]))
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


def test_losses_are_zero_for_equal_models_and_ignore_padding() -> None:
    student, teacher = pair("BertForSequenceClassification")
    batch = dict(tiny_checkpoints.tokenizer()(texts(4), padding=True, return_tensors="pt"))
    names = ("logits", "hidden", "hidden-cosine")
    for name in names:
        lesson = Imitation(teacher, copy.deepcopy(teacher), terms_of((name,), None, 2.0))
        assert float(lesson(**batch)["loss"]) == pytest.approx(0, abs=1e-5)
    lesson = Imitation(student, teacher, terms_of(names, None, 2.0))
    expected = float(lesson(**batch)["loss"])
    longer = {name: torch.nn.functional.pad(value, (0, 9)) for name, value in batch.items()}
    assert expected > 0.05
    assert float(lesson(**longer)["loss"]) == pytest.approx(expected, rel=1e-4)


def test_logits_loss_is_the_divergence_at_its_temperature() -> None:
    own, wanted = torch.randn(3, 5), torch.randn(3, 5)
    loss = terms_of(("logits",), None, 3.0)[0].loss
    found = loss(Seen({"logits": own}, (), {}, None), Seen({"logits": wanted}, (), {}, None), {})
    p, q = (wanted / 3).softmax(-1), (own / 3).softmax(-1)
    assert float(found) == pytest.approx(9 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    student, teacher = pair()
    whole = copy.deepcopy(student)
    trained(whole, teacher, accumulate=2)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    stopped = copy.deepcopy(student)
    with pytest.raises(KeyboardInterrupt):
        trained(stopped, teacher, accumulate=2, checkpoints=tmp_path / "run", callbacks=[Interrupt()])
    # A checkpoint that a kill has cut off counts for nothing.
    half = tmp_path / "run" / "distillation" / "checkpoint-6"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    stopped = copy.deepcopy(student)
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(state.global_step)

    trained(stopped, teacher, accumulate=2, checkpoints=tmp_path / "run", callbacks=[Watch()])
    assert seen[0] == 5
    assert same(weights(stopped), weights(whole))


def test_a_run_of_other_arguments_is_not_gone_on_with(tmp_path: Path) -> None:
    student, teacher = pair()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(copy.deepcopy(student), teacher, checkpoints=tmp_path / "run", callbacks=[Interrupt()])
    with pytest.raises(UsageError, match="restart"):
        trained(copy.deepcopy(student), teacher, checkpoints=tmp_path / "run", seed=1)
    trained(student, teacher, checkpoints=tmp_path / "run", seed=1, restart=True, steps=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no run"):
        trained(student, teacher, checkpoints=tmp_path / "other", restart=True)
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_training_that_helps_nothing_is_taken_back() -> None:
    student, teacher = pair()
    before = weights(student)
    done = trained(student, teacher, learning_rate=1.0, gradient_norm=1e9, warmup=0)
    assert all(loss > done.run.before for _, loss in done.run.stages[0].held_out[1:])
    assert done.run.after == pytest.approx(done.run.before, rel=1e-5)
    assert same(weights(student), before)


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run() -> None:
    student, teacher = pair()
    done = trained(student, teacher, learning_rate=0.3, evaluate_every=1, patience=2, steps=40, warmup=0)
    held_out = [loss for _, loss in done.run.stages[0].held_out]
    assert done.run.stages[0].steps < 40
    assert done.run.after == min(held_out) < held_out[-1]


def test_a_budget_of_time_ends_the_run() -> None:
    student, teacher = pair()
    started = time.monotonic()
    done = trained(student, teacher, steps=None, minutes=0.02, evaluate_every=1000)
    assert 1 < time.monotonic() - started < 120
    assert done.run.stages[0].steps >= 1
    # However short, it ends with an evaluation.
    assert done.run.stages[0].held_out[-1][0] == done.run.stages[0].steps


def test_low_rank_updates_are_merged() -> None:
    pytest.importorskip("peft")
    student, teacher = pair()
    before = weights(student)
    done = trained(student, teacher, lora=4, learning_rate=3e-2)
    after = weights(student)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"encoder.layer.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    }
    assert done.run.after < done.run.before
    assert done.run.stages[0].parameters < sum(value.numel() for value in before.values()) / 3


def test_a_missing_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"effc\[train\]"):
        trained(*pair(), lora=4)


def test_only_named_parameters_are_trained() -> None:
    student, teacher = pair()
    before = weights(student)
    trained(student, teacher, train=("*.attention.*",))
    changed = {name for name, value in weights(student).items() if not torch.equal(before[name], value)}
    assert changed and all(".attention." in name for name in changed)
    assert not any(parameter.grad is not None for parameter in student.parameters())


def test_pruned_weights_stay_zero() -> None:
    student, teacher = pair()
    matrix = student.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        matrix[:, ::2] = 0
    assert keep_zeros(student)
    trained(student, teacher)
    assert not matrix[:, ::2].any() and matrix[:, 1::2].all()
    with pytest.raises(PreconditionError, match="pruned"):
        trained(student, teacher, lora=2)


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_saving_memory_changes_no_result(activations: str) -> None:
    student, teacher = pair()
    other = copy.deepcopy(student)
    losses = ["hidden", "attention"]
    trained(student, teacher, losses=losses, steps=3)
    trained(other, teacher, losses=losses, steps=3, activations=activations)
    assert other.training is False and not other.is_activation_checkpointing
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=1e-6)


def saved_by(run: Any) -> int:
    """How many numbers autograd keeps for the backward pass."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(sizes)


def test_recomputing_keeps_less_in_memory() -> None:
    student, teacher = pair()
    batch = dict(tiny_checkpoints.tokenizer()(texts(4), padding=True, return_tensors="pt"))
    sizes = {}
    for activations in (False, True):
        if activations:
            student.activation_checkpointing_enable({"use_reentrant": False})
        lesson = Imitation(student, teacher, terms_of(("embedding",), None, 1.0)).train()
        sizes[activations] = saved_by(lambda lesson=lesson: lesson(**batch))
    assert sizes[True] < 0.5 * sizes[False]


def test_examples_of_any_input_can_be_trained_on() -> None:
    student, teacher = pair("ViTModel")
    examples = [{"pixel_values": torch.randn(3, 32, 32)} for _ in range(20)]
    done = effc.distill(student, teacher, examples, losses=["hidden"], **STEPS)
    assert done.run.after < done.run.before


def test_labels_of_the_data_are_a_loss() -> None:
    student, teacher = pair("BertForSequenceClassification")
    samples = [Sample(text, int(len(text.split()) > 8)) for text in texts(80)]
    done = trained(student, teacher, data=samples, losses=["labels"], steps=20, evaluate_every=10)
    assert done.run.after < 0.9 * done.run.before
    with pytest.raises(PreconditionError, match="no labels"):
        trained(student, teacher, losses=["labels"])


def test_a_causal_model_learns_logits_and_next_tokens() -> None:
    student, teacher = pair("LlamaForCausalLM")
    done = trained(student, teacher, losses=["logits", "hidden", "labels:0.1"], task="causal-lm")
    assert done.run.after < done.run.before


def test_a_shallower_student_is_compared_at_the_same_depth() -> None:
    student, teacher = tiny_checkpoints.model("BertModel", num_hidden_layers=1), pair()[1]
    done = trained(student, teacher, losses=["hidden"])
    assert done.run.after < done.run.before
    narrow = tiny_checkpoints.model("BertModel", hidden_size=8)
    with pytest.raises(PreconditionError, match="same width"):
        trained(narrow, teacher)


def test_held_out_texts_are_not_trained_on() -> None:
    given = [*texts(30), *texts(30)]
    never = Sample(given[0])
    material = material_of(given, held_out=8, seed=0, collate_texts=lambda items: {}, never=frozenset({never}))
    assert len(material.train) + len(material.held_out) == 29
    assert not set(material.train) & set(material.held_out)
    assert never not in material.train and never not in material.held_out
    again = material_of(given, held_out=8, seed=0, collate_texts=lambda items: {})
    assert again.digest != material.digest
    with pytest.raises(DataError, match="held out"):
        material_of(["one"], held_out=1, seed=0, collate_texts=lambda items: {})


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"losses": ["hiden"]}, UsageError, "hidden"),
        ({"losses": ["hidden:-1"]}, UsageError, "positive"),
        ({"losses": [3]}, UsageError, "function"),
        ({"losses": ["logits"]}, PreconditionError, "logits"),
        ({"learning_rat": 1}, UsageError, "learning_rate"),
        ({"lora": 4, "fake_quant": True}, UsageError, "exclude each other"),
        ({"train": ["*.atention.*"]}, PreconditionError, "matches no parameter"),
        ({"trackers": ["tensorbord"]}, UsageError, "tensorboard"),
        ({"data": ["a", {"input_ids": 1}]}, DataError, "neither"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        trained(*pair(), **changes)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    student, teacher = pair()

    def broken(own: Seen, wanted: Seen, batch: Any) -> torch.Tensor:
        loss = own.outputs["last_hidden_state"].sum()
        return loss * float("nan") if torch.is_grad_enabled() else loss

    with pytest.raises(PassFailedError, match="nan"):
        trained(student, teacher, losses=[broken])


@pytest.mark.parametrize(
    ("given", "steps", "minutes"),
    [("500", 500, None), ("20m", None, 20), ("1.5h", None, 90), (300, 300, None), ("10 steps", 10, None)],
)
def test_budgets_have_a_short_form(given: Any, steps: int | None, minutes: float | None) -> None:
    section = RecoverSection.model_validate(given)
    assert section.enabled and (section.steps, section.minutes) == (steps, minutes)
    inside = RecoverSection.model_validate({"minutes": 3, "data": "x", "budget": given})
    assert (inside.steps, inside.minutes, inside.data) == (steps, minutes, "x")


def test_recovery_is_off_unless_asked_for() -> None:
    assert not RecoverSection().enabled and RecoverSection().time_budget == 20
    assert RecoverSection.model_validate({"data": "x"}).enabled
    assert not RecoverSection.model_validate({"data": "x", "enabled": False}).enabled
    assert not RecoverSection.model_validate(RecoverSection().model_dump()).enabled
    with pytest.raises(ValueError, match="no budget"):
        RecoverSection.model_validate("soon")


_COMMAND = "from effc.cli import main; main()"


def _distill(folder: Path, output: Path, *more: str) -> list[str]:
    arguments = ["distill", folder / "student", folder / "teacher", "--data", folder / "texts.txt", "-o", output]
    settings = ["--steps", "60", "--batch", "4", "--evaluate-every", "5", "--learning-rate", "0.005", "--json"]
    return [sys.executable, "-c", _COMMAND, *map(str, arguments), *settings, *more]


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EFFC_CACHE": str(tmp_path / "cache")}
    subprocess.run(_distill(folder, tmp_path / "whole"), env=environment, check=True, capture_output=True)
    killed = subprocess.Popen(_distill(folder, tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL)
    stage = tmp_path / "killed.run" / "distillation"
    until = time.monotonic() + 240
    while not list(stage.glob("checkpoint-*/complete.json")):
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    reached = {int(path.name.split("-")[1]) for path in stage.glob("checkpoint-*")}
    assert reached and max(reached) < 60
    subprocess.run(_distill(folder, tmp_path / "killed"), env=environment, check=True, capture_output=True)
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert same(*found)
    assert not same(found[0], load_file(folder / "student" / "model.safetensors"))


@pytest.mark.slow
def test_several_processes_train_together(folder: Path, tmp_path: Path) -> None:
    """What ``accelerate launch`` needs: gradients are averaged, and one process writes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    script = tmp_path / "script.py"
    script.write_text(_COMMAND)
    command = [*launcher, "--main_process_port", "0", str(script), *_distill(folder, tmp_path / "out")[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "distill.json").read_text())["run"]
    assert record["after"] < record["before"]
    AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("T5EncoderModel", "dense"),
        ("T5EncoderModel", "local:8"),
        ("BertModel", "local:8|global:1"),
        ("BertModel", "topk:4"),
    ],
)
def test_rewritten_models_move_to_another_device(kind: str, form: str) -> None:
    """A device that computes nothing but refuses tensors of others, as every GPU does."""
    model = tiny_checkpoints.model(kind)
    inputs = {"input_ids": torch.randint(5, 20, (2, 20)), "attention_mask": torch.ones(2, 20, dtype=torch.int64)}
    observed = ObservedAttention(model, inputs)
    observed.use({layer.name: observed.checked(parse_form(form), layer) for layer in observed.layers})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("meta")
        outputs = model(**{name: value.to("meta") for name, value in inputs.items()})
    assert outputs.last_hidden_state.device.type == "meta"
