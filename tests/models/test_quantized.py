"""Teachers and students with weights of 4 and 8 bits: bitsandbytes at work on the CPU, no stand-in."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import config, losses, trainer_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gkd.models.fingerprint import fingerprint
from gkd.models.loading import load_teacher
from gkd.models.quantized import keep_layout, with_quantization
from gkd.recipe.build import build_trainer
from gkd.recipe.settings import parse
from gkd.rollouts.folding import foldable
from gkd.training.trainer import GKDTrainer

pytest.importorskip("bitsandbytes")

FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
CALM = {"hidden": 128, "layers": 2, "initializer_range": 0.05}  # weights and logits as large as trained models'
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("quantized") / "teacher", seed=2, **CALM)


def packed(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Linear")}


FORMS: dict[str, dict[str, Any]] = {
    "fields": FOUR,
    "dict": {"quantization_config": FOUR},
    "dict with its method": {"quantization_config": {**FOUR, "quant_method": "bitsandbytes"}},
    "object": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_teacher(form, folder):
    kwargs = copy.deepcopy(FORMS[form])
    before = copy.deepcopy(kwargs)
    model = load_teacher(folder, kwargs)
    assert str(kwargs) == str(before), "the user's dict was changed"
    assert packed(model) == {"Linear4bit", "Linear"}
    assert type(model.get_output_embeddings()) is torch.nn.Linear, "the head is not quantized"
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 30)[None]).logits
        expected = load_teacher(folder, FOUR)(input_ids=torch.arange(1, 30)[None]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_four_bits_are_unpacked_to_the_dtype_of_the_rest():
    half = with_quantization({**FOUR, "dtype": torch.bfloat16}, torch.bfloat16, "f")["quantization_config"]
    assert half.bnb_4bit_compute_dtype == torch.bfloat16
    given = with_quantization({**FOUR, "bnb_4bit_compute_dtype": "float16"}, torch.bfloat16, "f")
    assert given["quantization_config"].bnb_4bit_compute_dtype == torch.float16
    other = {"quantization_config": {"quant_method": "gptq", "bits": 4}, "revision": "x"}
    assert with_quantization(other, torch.float32, "f") == other


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({**FOUR, "quantization_config": EIGHT}, "side by side"),
        ({**FOUR, **EIGHT}, "set one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": False}, "quantizes to nothing"),
        ({"quantization_config": {**FOUR, "bnb_4bit_quant": "nf4"}}, "has no bnb_4bit_quant;"),
    ],
)
def test_refused(kwargs, words, folder):
    with pytest.raises(ValueError, match=words):
        load_teacher(folder, kwargs)


def test_from_the_command_line_and_yaml(folder, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--teacher_model_init_kwargs", json.dumps(FOUR)]
    assert parse({}, argv).training.teacher_model_init_kwargs == FOUR
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nteacher_model_init_kwargs:\n  quantization_config:\n    load_in_8bit: true\n"
    )
    kwargs = parse({}, ["--config", str(path)]).training.teacher_model_init_kwargs
    assert packed(load_teacher(folder, kwargs)) == {"Linear8bitLt", "Linear"}


def _train(folder: str, out: Any, student: Any = None, **values: Any) -> GKDTrainer:
    trainer = GKDTrainer(
        model=student if student is not None else tiny_model(seed=1),
        args=config(out, learning_rate=1e-3, optim="adamw_torch", **values),
        teacher_model=folder,
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=LORA,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4", "8"])
def test_trains_and_writes(bits, folder, tmp_path, monkeypatch):
    """All three sources, and the teacher's cache, whose key must not move when it has scored."""
    moved = []
    teacher_to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda self, *a, **k: (moved.append(self), teacher_to(self, *a, **k))[1],
    )
    settings = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4")
    args = {"lmbda": 0.5, "seq_kd": True, "max_steps": 2, "report_to": ["tensorboard"]}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = _train(folder, tmp_path, teacher_model_init_kwargs={"quantization_config": settings}, **args)
    assert trainer.teacher_model.is_quantized
    assert all(model is not trainer.teacher_model for model in moved), "packed weights were moved"
    assert len(losses(trainer)) == 2
    assert all(0 < loss < 5 for loss in losses(trainer))
    assert trainer.args.teacher_model_init_kwargs == {"quantization_config": settings}, "logging changed it"
    mark = fingerprint(trainer.teacher_model)
    assert mark == fingerprint(load_teacher(folder, {"quantization_config": settings}))
    assert mark != fingerprint(load_teacher(folder, None))
    assert trainer.rollouts["teacher"].store.about()["key"]["model"] == mark


def test_a_quantized_student_from_the_command_line(folder, tmp_path):
    flags = {
        "model_name_or_path": folder,
        "teacher_model_name_or_path": folder,
        "output_dir": tmp_path,
        "max_steps": 1,
        "max_new_tokens": 4,
        "report_to": "none",
    }
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    settings = parse({}, [*argv, "--use_peft", "--load_in_4bit"])
    trainer = build_trainer(settings, {"train": Dataset.from_list(tiny_rows(8))})
    trainer.train()
    assert "Linear4bit" in packed(trainer.model)
    assert "Linear4bit" not in packed(trainer.teacher_model), "the student's quantization is the student's"


def test_a_layer_that_was_packed_for_inference_has_a_gradient_again(folder):
    """On processors with AVX512-BF16 a 4-bit layer that has run in eval mode gives no gradient to its input."""
    model = load_teacher(folder, FOUR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, layer = torch.arange(1, 9)[None], model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        model.eval()(input_ids=ids)
    keep_layout(model)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for name, value in model.state_dict().items():
        if not name.endswith("absmax"):  # bitsandbytes rounds the scales when it packs
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    dense = layer(torch.eye(layer.in_features))  # the layer's matrix, from its own forward pass
    torch.testing.assert_close(x.grad, dense.sum(dim=1).expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4", "8"])
def test_a_quantized_student_trains_its_adapter(bits, folder, tmp_path):
    """QLoRA: rollouts from packed weights, a gradient in the adapter only, the base bit-identical afterwards."""
    student = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**bits))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    args = {"lmbda": 1.0, "max_new_tokens": 12, "max_steps": 3, "gradient_checkpointing": True}
    trainer = _train(save_tiny(tmp_path / "teacher", hidden=48, seed=3), tmp_path / "out", student, **args)
    ours = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    assert ours.keys() >= {name for name in before if "weight" in name}
    for name, value in before.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=f"{name} has changed")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(0 < line["grad_norm"] < 50 for line in lines)
    assert all(line["rollout/length_mean/student"] > 1 for line in lines)
    written = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert written
    assert all(p.abs().max() > 0 for p in written), "an adapter was not trained"


def test_no_adapter_is_folded_into_packed_weights(folder):
    """Packed weights cannot take a folded adapter: it is applied layer by layer."""
    student = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**FOUR))
    student = get_peft_model(student, LORA)
    assert foldable(student) == []
    assert foldable(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA)) != []


def test_a_model_that_is_saved_quantized(folder, tmp_path):
    """It loads as it is, and is refused where it could not stay so before its weights are read."""
    saved = tmp_path / "packed"
    load_teacher(folder, FOUR).save_pretrained(saved)
    assert packed(load_teacher(str(saved), None)) == {"Linear4bit", "Linear"}
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not go with a quantized teacher"):
        load_teacher(str(saved), None, placement="cpu_offload")


def test_other_placements_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="does not go with a quantized teacher"):
        _train(folder, tmp_path, teacher_model_init_kwargs=FOUR, teacher_placement="cpu_offload")
    with pytest.raises(ValueError, match="does not go with a quantized teacher"):
        trainer_of(tmp_path, teacher=load_teacher(folder, FOUR), teacher_placement="cpu_offload")
