"""The student as it comes: by name or as a model, in any precision, frozen or of another kind; and as it is saved."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer, tiny_vision_model
from training import config, dense_loss, logged, losses, trainer_of
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from gkd.data.sequences import unpad
from gkd.recipe.build import build_trainer
from gkd.recipe.settings import parse
from gkd.training.trainer import GKDTrainer


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("student"), seed=1)


def test_one_name_may_be_student_and_teacher(student, tmp_path):
    trainer = GKDTrainer(student, student, config(tmp_path, lmbda=0.0), train_dataset=Dataset.from_list(tiny_rows(4)))
    trainer.train()
    assert losses(trainer) == [0.0]  # one model twice
    assert trainer.teacher_model is not trainer.model
    same = tiny_model()
    with pytest.raises(ValueError, match=r"the same object.*copy\.deepcopy"):
        trainer_of(tmp_path, student=same, teacher=same)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_saved_config_says_about_the_cache_what_the_students_did(use_cache, tmp_path):
    name = save_tiny(tmp_path / "student", seed=1, use_cache=use_cache)
    for model in (name, AutoModelForCausalLM.from_pretrained(name)):
        trainer = trainer_of(tmp_path, student=model, gradient_checkpointing=True)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is use_cache


def test_a_frozen_student_is_refused(student, tmp_path):
    frozen = tiny_model(seed=1).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient.*peft_config"):
        trainer_of(tmp_path, student=frozen)
    get_peft_model(tiny_model(seed=1), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(tmp_path, student=loaded)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("by_name", [True, False])
def test_other_kinds_of_models_are_refused(role, by_name, tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    if by_name:
        model.save_pretrained(tmp_path / "t5")
        tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=rf"the {role} is an encoder-decoder \((t5|T5For\w+)\)"):
        trainer_of(tmp_path, **{role: str(tmp_path / "t5") if by_name else model})


def test_a_model_that_fills_in_masks_is_refused(tmp_path):
    values = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=259, **values))
    with pytest.raises(ValueError, match=r"the student \(BertForMaskedLM\) cannot generate"):
        trainer_of(tmp_path, student=bert)


def test_the_pad_token_is_the_tokenizers_from_construction_on(tmp_path):
    student = tiny_model(seed=1, pad_token_id=None)
    trainer_of(tmp_path, student=student)
    assert student.config.pad_token_id == student.generation_config.pad_token_id == 256


def test_full_fine_tuning_in_16_bits_warns(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lora = LoraConfig(r=2, target_modules="all-linear")
    for peft_config in (lora, None):
        trainer_of(tmp_path, student=tiny_model(seed=1).bfloat16(), peft_config=peft_config, lmbda=0.0).train()
        found = [r for r in caplog.records if "weights in bfloat16" in r.message]
        assert len(found) == (peft_config is None)


def test_a_quantized_student_by_name(student, tmp_path):
    rows, lora = Dataset.from_list(tiny_rows(4)), LoraConfig(r=2, target_modules=["q_proj"])
    bits = BitsAndBytesConfig(load_in_4bit=True)
    common = {"teacher_model": tiny_model(seed=2), "train_dataset": rows, "processing_class": tiny_tokenizer()}
    trainer = GKDTrainer(student, args=config(tmp_path), peft_config=lora, quantization_config=bits, **common)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    trainer.train()
    with pytest.raises(ValueError, match="no effect: the student is already a model"):
        GKDTrainer(tiny_model(), args=config(tmp_path), quantization_config=bits, **common)
    twice = config(tmp_path, model_init_kwargs={"quantization_config": bits})
    with pytest.raises(ValueError, match="given twice"):
        GKDTrainer(student, args=twice, quantization_config=bits, **common)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": []}


def test_a_mixture_of_experts_has_a_loss_before_it_trains(tmp_path):
    trainer = trainer_of(tmp_path, student=tiny_model("qwen3_moe", seed=1, **MOE), router_aux_loss_coef=0.1)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    number = torch.tensor(8)
    with_it = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number).item()
    balance = trainer._metrics["train"]["aux_loss"][-1]
    trainer.router_aux_loss_coef = 0.0
    without = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number).item()
    assert with_it - without == pytest.approx(0.1 * balance, rel=1e-4)


def test_routers_without_an_auxiliary_loss_train_with_one_warning(tmp_path, caplog):
    values = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "head_dim": 16}
    student = tiny_model("llama4_text", seed=1, **values)
    trainer = trainer_of(tmp_path, student=student, max_steps=2, router_aux_loss_coef=0.01, lmbda=0.0)
    trainer.train()
    assert len([r for r in caplog.records if "gives no auxiliary loss" in r.message]) == 1
    assert len(losses(trainer)) == 2
    assert not logged(trainer, "aux_loss")


def test_ids_that_no_text_holds_keep_no_student_from_its_teacher(tmp_path):
    """The divergence, by its definition, over the ids that both know; padding with an id that only one can read."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    student, teacher = tiny_model(seed=1, vocab=260), tiny_model(hidden=48, layers=3, seed=2)
    rows = Dataset.from_list(tiny_rows(4))
    trainer = GKDTrainer(
        student,
        teacher,
        config(tmp_path, lmbda=0.5, seq_kd=True, learning_rate=0.0),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    seen = []
    write = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *a: seen.append(write(*a)) or seen[-1]
    trainer.train()
    batches, _ = seen[0]
    sequences = [sequence for batch in batches for sequence in unpad(batch)]
    assert max(int(batch["input_ids"].max()) for batch in batches) < 259

    def logits(model):
        return lambda input_ids: SimpleNamespace(logits=model(input_ids=input_ids).logits[..., :259])

    with torch.no_grad():
        expected = dense_loss(logits(student), logits(teacher), sequences).item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_a_tokenizer_with_one_more_id_than_both_heads_trains(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    common = {"teacher_model": tiny_model(seed=2), "processing_class": tokenizer}
    rows = tiny_rows(4)
    trainer = GKDTrainer(tiny_model(seed=1), args=config(tmp_path), train_dataset=Dataset.from_list(rows), **common)
    trainer.train()
    rows[2]["messages"][-1]["content"] = "<image> of a cat"
    with pytest.raises(
        ValueError, match=r"row 2 .* holds id 259 \('<image>'\), and the student's output head has 259"
    ):
        GKDTrainer(tiny_model(seed=1), args=config(tmp_path), train_dataset=Dataset.from_list(rows), **common)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt_neox", "llama"])
def test_a_folder_without_tokenizer_files(kind, tmp_path, caplog):
    """transformers makes a tokenizer without text, or none, of the model's config."""
    tiny_model(kind, seed=2).save_pretrained(tmp_path / "bare")
    rows = Dataset.from_list([{"prompt": "a question:", "completion": " an answer"}] * 4)
    with pytest.raises(ValueError, match=r"the tokenizer of '.*bare' cannot be loaded: .*save it beside the model"):
        GKDTrainer(str(tmp_path / "bare"), tiny_model(), config(tmp_path), train_dataset=rows)
    trainer = trainer_of(tmp_path, teacher=str(tmp_path / "bare"), lmbda=0.0)
    assert len([r for r in caplog.records if "token map cannot be compared" in r.message]) == 1
    trainer.train()


def test_new_tokens_trained_beside_lora_with_tied_embeddings(tmp_path):
    """Refused by the name of the option, whose remedies train."""
    lora = {"target_modules": ["q_proj"], "r": 2}
    peft_config = LoraConfig(**lora, trainable_token_indices=[257, 258])
    with pytest.raises(ValueError, match=r"^trainable_token_indices with tied embeddings.*ensure_weight_tying=True"):
        trainer_of(tmp_path, student=tiny_model(seed=1, tie_word_embeddings=True), peft_config=peft_config)
    whole = LoraConfig(**lora, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    for tied, remedy in ((True, whole), (False, peft_config)):
        student = tiny_model(seed=1, tie_word_embeddings=tied)
        trainer_of(tmp_path, student=student, peft_config=remedy, lmbda=0.0).train()


@pytest.mark.parametrize("kind", ["gemma3", "mllama", "smolvlm", "llava"])
def test_a_model_for_images_trains_what_text_reaches(kind, tmp_path):
    """Every parameter that is trained has a gradient, which is what DDP waits for; nothing else is."""
    student = tiny_vision_model(kind, seed=1)
    trainer = trainer_of(tmp_path, student=student, gradient_checkpointing=True, learning_rate=0.0, lmbda=0.5)
    found = {}
    trainer.add_callback(Gradients(found))
    trainer.train()
    assert found == {name: p.requires_grad for name, p in student.named_parameters()}
    frozen = {name for name, trained in found.items() if not trained}
    assert any("vision" in name for name in frozen)
    assert not [name for name in frozen if "language_model" in name and not (kind == "mllama" and "layers.1." in name)]


class Gradients(TrainerCallback):
    """Which parameters have one before the optimizer's step."""

    def __init__(self, found):
        self.found = found

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.update({name: p.grad is not None for name, p in model.named_parameters()})


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("exclude", [None, ["up_proj"], r".*\.up_proj"])
def test_no_adapter_on_what_text_does_not_reach(by_name, exclude, tmp_path):
    student = tiny_vision_model("smolvlm", seed=1)
    if by_name:
        student.save_pretrained(tmp_path / "student")
        student = str(tmp_path / "student")
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=exclude)
    trainer = trainer_of(tmp_path, student=student, peft_config=lora, lmbda=0.0)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(".text_model." in name for name in names)
    assert any("down_proj" in name for name in names)
    assert any("up_proj" in name for name in names) == (exclude is None)
    assert lora.exclude_modules == LoraConfig(exclude_modules=exclude).exclude_modules
    trainer.train()


@pytest.fixture(scope="module")
def adapter(student, tmp_path_factory):
    """What a run with LoRA leaves, without a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(student), lora).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("peft", [True, False])
def test_the_student_may_be_an_adapter_that_goes_on(peft, student, adapter, tmp_path, caplog):
    """From the command line, with the first run's flags or without them: FAQ, "May the student be a base model?"."""
    teacher = save_tiny(tmp_path / "teacher", hidden=48, seed=2)
    argv = ["--model_name_or_path", adapter, "--teacher_model_name_or_path", teacher, "--output_dir", str(tmp_path)]
    argv += ["--max_steps", "1", "--report_to", "none", "--lmbda", "0.5", "--max_new_tokens", "4", "--use_cpu"]
    argv += ["--warmup_steps", "0"]
    settings = parse({}, [*argv, *(["--use_peft", "--lora_r", "8", "--lora_alpha", "8"] if peft else [])])
    trainer = build_trainer(settings, {"train": Dataset.from_list(tiny_rows(16))})
    own = load_file(f"{adapter}/adapter_model.safetensors")

    def weights():
        state = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        return {name.replace(".default", ""): p.detach().clone() for name, p in state.items()}

    before = weights()
    assert before.keys() == own.keys()
    assert all(torch.equal(before[name], own[name]) for name in own)
    warned = [r.getMessage() for r in caplog.records if "goes on with the adapter" in r.getMessage()]
    assert len(warned) == peft
    assert all("r=8 (it has 4)" in text and "target_modules" in text and student in text for text in warned)
    assert not [r for r in caplog.records if "model_init_kwargs" in r.getMessage()]
    trainer.train()
    assert not any(torch.equal(now, before[name]) for name, now in weights().items())
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == student


def test_a_teacher_that_is_an_adapter_has_a_field_of_its_own(student, adapter, tmp_path):
    with pytest.raises(ValueError, match="is an adapter of") as error:
        trainer_of(tmp_path, teacher=adapter)
    for field, value in (("teacher_model_name_or_path", student), ("teacher_adapter_name_or_path", adapter)):
        assert f"{field}={value!r}" in str(error.value)
    trainer = trainer_of(tmp_path, student=adapter, teacher=student, teacher_adapter_name_or_path=adapter, lmbda=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0, abs=1e-6)  # one adapter on one base, twice


def test_the_base_of_an_adapter_is_shared_with_its_teacher(student, adapter, tmp_path):
    args = config(tmp_path, share_base_model=True, lmbda=0.0)
    trainer = GKDTrainer(adapter, student, args, train_dataset=Dataset.from_list(tiny_rows(4)))
    assert len(trainer.processing_class) == 259  # the base's, since the adapter has none
    trainer.train()
    assert losses(trainer)[0] > 0


def test_an_adapter_whose_base_is_gone(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone"}))
    with pytest.raises(ValueError, match=r"'/gone'.* cannot be loaded"):
        trainer_of(tmp_path, student=str(tmp_path / "adapter"))
