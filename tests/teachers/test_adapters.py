"""Teachers with adapters, on the student's own base, and several of them: each is a full model computed by hand."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import change, config, dense_loss, logged, losses
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gkd.training.trainer
from gkd.config.fields import GKDConfig
from gkd.models.quantized import keep_layout
from gkd.models.shared_weights import base_of_student, second_model
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout
from gkd.training.trainer import GKDTrainer

R, ALPHA = 4, 8
EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"), seed=1)


def make_adapter(folder: Path, seed: int, model: Any = None, **options: Any) -> str:
    """A LoRA adapter that changes the model's output much, on all kinds of layers, the embeddings included."""
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM", **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(model or tiny_model(seed=1), lora)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("adapters")
    return {"math": make_adapter(folder / "math", 1), "chat": make_adapter(folder / "chat", 2), "plain": None}


def full(adapter: str | None) -> Any:
    """The base with the adapter's product added to its weights: W + alpha / r B A, by hand, in float64."""
    model = tiny_model(seed=1)
    if adapter is None:
        return model
    saved = load_file(Path(adapter) / "adapter_model.safetensors")
    for name, down in saved.items():
        if "lora_A" in name:
            place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = saved[name.replace("lora_A", "lora_B")]
            weight = model.get_submodule(place).weight
            weight.data = (weight.data.double() + ALPHA / R * up.double() @ down.double()).float()
    return model


def student_of(base: str, dropout: float = 0.2, **options: Any) -> Any:
    """A student in the middle of its training: its adapter says something already."""
    model = tiny_model(seed=1)
    model.config._name_or_path = base
    lora = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": ["q_proj", "up_proj"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        student = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**lora, **options}))
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return student


def trainer_on(folder: Path, student: Any, rows: Any = None, teacher: Any = None, **values: Any) -> GKDTrainer:
    extra = {name: values.pop(name) for name in ("peft_config", "eval_dataset", "data_collator") if name in values}
    return GKDTrainer(
        student,
        teacher,
        config(folder, **values),
        train_dataset=rows if rows is not None else Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def trained(*args: Any, **values: Any) -> tuple[GKDTrainer, torch.Tensor]:
    """Build and train at once: the global random streams are the ones that building has left."""
    trainer = trainer_on(*args, **values)
    return trainer, change(trainer)


def rows_of(names: list[str], n: int = 16) -> Dataset:
    return Dataset.from_list([{**row, "teacher": names[i % len(names)]} for i, row in enumerate(tiny_rows(n))])


# ------------------------------------------------------------------------------------------ an adapter on a teacher


@pytest.mark.parametrize("passed", ["by name", "as a model"])
def test_a_teacher_with_an_adapter_is_the_full_model(passed, base, adapters, tmp_path):
    tuned = str(adapters["math"])
    expected, expected_change = trained(tmp_path / "a", student_of(base), teacher=full(tuned), lmbda=0.0)
    own = tiny_model(seed=1)
    before = copy.deepcopy(own)
    found, found_change = trained(
        tmp_path / "b",
        student_of(base),
        teacher=base if passed == "by name" else own,
        lmbda=0.0,
        teacher_adapter_name_or_path=tuned,
    )
    torch.testing.assert_close(found_change, expected_change, **EXACT)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
    assert list(own.state_dict()) == list(before.state_dict()), "the caller's model has got adapters"
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), before.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in found.teacher_model.parameters())


# ------------------------------------------------------------------------------------------------- the shared base


@pytest.mark.parametrize("values", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["math", "plain"])
def test_a_shared_base_trains_as_a_teacher_of_its_own(name, values, base, adapters, tmp_path):
    """Two steps with dropout in the student's adapter and all three sources: scoring and the teacher's rollouts move
    nothing of the student, its random streams included."""
    common = {"lmbda": 0.5, "seq_kd": True, "max_steps": 2, "gradient_accumulation_steps": 2, **values}
    expected, expected_change = trained(tmp_path / "a", student_of(base), teacher=full(adapters[name]), **common)
    found, found_change = trained(
        tmp_path / "b",
        student_of(base),
        share_base_model=True,
        teacher_adapter_name_or_path=adapters[name],
        teacher_model_name_or_path=base,
        **common,
    )
    torch.testing.assert_close(found_change, expected_change, **EXACT)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
    assert min(losses(found)) > 1e-3  # the teacher is another model than the student
    assert logged(found, "rollout/length_mean/teacher") == logged(expected, "rollout/length_mean/teacher")


def test_the_weights_are_there_once_and_scoring_leaves_the_student_as_it_is(base, adapters, tmp_path):
    trainer = trainer_on(
        tmp_path,
        student_of(base, modules_to_save=["norm"]),
        share_base_model=True,
        teacher_adapter_name_or_path=adapters["math"],
        gradient_checkpointing=True,
        learning_rate=1e-3,
    )
    student, teacher = trainer.model, trainer.teacher_model
    bytes_of = {p.untyped_storage().data_ptr(): p.numel() for m in (student, teacher) for p in m.parameters()}
    extra = sum(p.numel() for n, p in teacher.named_parameters() if "lora_" in n)
    assert sum(bytes_of.values()) == sum(p.numel() for p in student.parameters()) + extra
    student.train()
    next(student.modules()).training = True

    def state() -> Any:
        modules = [
            (n, m.training, getattr(m, "gradient_checkpointing", None), getattr(m, "_disable_adapters", None))
            for n, m in student.named_modules()
        ]
        grads = [(n, p.requires_grad, p.data_ptr(), p._version) for n, p in student.named_parameters()]
        streams = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
        return modules, grads, streams, hooks, student.active_adapters, list(student.peft_config)

    batch = next(iter(trainer.get_train_dataloader()))
    prompts = [[65, 66, 67], [80, 81]]
    before = state()
    trainer.teacher.score(batch)
    trainer.rollouts["teacher"].generate(prompts, 0)
    assert state() == before
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in teacher.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    expected = full(adapters["math"])
    ids = torch.tensor([[65, 66, 67, 68]])
    torch.testing.assert_close(teacher(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_only_the_students_adapter_is_saved_and_resuming_goes_on(base, adapters, tmp_path):
    values: dict[str, Any] = {
        "share_base_model": True,
        "teacher_adapter_name_or_path": adapters["chat"],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lmbda": 0.5,
        "seq_kd": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    whole = trainer_on(tmp_path / "whole", student_of(base), **values)
    whole.train()
    resumed = trainer_on(tmp_path / "whole", student_of(base), **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **EXACT)
    resumed.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").rglob("*math*")) + list((tmp_path / "saved").glob("model*"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {2}  # the student's rank
    assert len(saved) == 2 * 2 * 2  # A and B of two layers in two blocks
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["r"] == 2


Q_AND_V: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
TIED = {"tie_word_embeddings": True}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ADAPTERS: dict[str, tuple[tuple[str, dict[str, Any]], Any]] = {
    "head": (("qwen2", {}), LoraConfig(**Q_AND_V, modules_to_save=["lm_head"])),
    "embeddings, tied": (("qwen2", TIED), LoraConfig(**Q_AND_V, modules_to_save=["embed_tokens"])),
    "both, tied": (("qwen2", TIED), LoraConfig(**Q_AND_V, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "new tokens, tied": (("qwen2", TIED), LoraConfig(**Q_AND_V, trainable_token_indices=[1, 2])),
    "lora on embeddings": (("qwen2", {}), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "dora": (("gemma2", {}), LoraConfig(**Q_AND_V, use_dora=True)),
    "transposed weights": (("gpt2", {}), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    "experts": (("qwen3_moe", MIXTURE), LoraConfig(**Q_AND_V, target_parameters=["mlp.experts.down_proj"])),
    "ia3": (("qwen2", {}), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "oft": (("qwen2", {}), OFTConfig(target_modules=["q_proj"], oft_block_size=4)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_is_found_behind_every_kind_of_adapter(name):
    (kind, options), adapter = ADAPTERS[name]
    ids = torch.arange(1, 30)[None]
    base = tiny_model(kind, **options)
    student = get_peft_model(copy.deepcopy(base), adapter).eval()
    for parameter in (p for p in student.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.rand_like(parameter)
    teacher = base_of_student(student)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        torch.testing.assert_close(teacher(input_ids=ids).logits, expected, rtol=0, atol=0)
        assert not torch.allclose(student(input_ids=ids).logits, expected, atol=0.1)
    assert {id(p) for p in teacher.parameters()} <= {id(p) for p in student.parameters()}
    assert list(teacher.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_shared_too(bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path / "base", seed=2, hidden=128, initializer_range=0.05)
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map={"": "cpu"})

    student = get_peft_model(loaded(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = trainer_on(tmp_path, student, share_base_model=True, lmbda=0.5, learning_rate=0.1)
    own = keep_layout(loaded())  # bitsandbytes' kernel for the other layout rounds to bf16
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.teacher.score(batch)
    with torch.no_grad():
        logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = logits[:, :-1][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(found.head.logits(found.hidden), expected, rtol=1e-5, atol=1e-5)

    def packed(model: Any) -> list[int]:
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)  # PEFT's layers are called like them
        layers = [m for m in model.modules() if isinstance(m, kinds)]
        return [(m.weight if bits == 4 else m.state.CB).data_ptr() for m in layers]

    assert len(packed(trainer.teacher_model)) == 14
    assert packed(trainer.teacher_model) == packed(student)


# ------------------------------------------------------------------------------------------------ several teachers


@pytest.mark.parametrize("shared", [True, False], ids=["student's base", "own base"])
def test_each_row_is_scored_and_answered_by_its_own_teacher(shared, base, adapters, tmp_path, monkeypatch):
    windows: list[Any] = []
    count = gkd.training.trainer.count
    monkeypatch.setattr(gkd.training.trainer, "count", lambda sequences: windows.append(sequences) or count(sequences))
    names = list(adapters)
    trainer = trainer_on(
        tmp_path,
        student_of(base, dropout=0.0),
        rows_of(names),
        eval_dataset=rows_of(names[::-1], 6),
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        teacher_adapters=adapters,
        lmbda=0.5,
        seq_kd=True,
        temperature=0.0,
        learning_rate=0.0,
        **({"share_base_model": True} if shared else {"teacher_model_name_or_path": base}),
    )
    trainer.train()
    models = {name: full(adapter) for name, adapter in adapters.items()}
    (window,) = windows
    by_teacher: dict[str, list[Any]] = {name: [s for s in window if names[s.row % 3] == name] for name in names}
    written = 0
    for name, sequences in by_teacher.items():
        assert all(names[s.teacher] == name for s in sequences)
        expected = dense_loss(trainer.model, models[name], sequences).item()
        assert logged(trainer, f"teacher/{name}/divergence") == pytest.approx([expected], rel=1e-5)
        settings = SamplingSettings(8, temperature=0.0, stop_ids=trainer.stop_ids["teacher"])
        rollout = HFRollout(lambda name=name: models[name], None, settings, seed=0)
        for sequence in sequences:
            if sequence.source == "teacher":
                prompt = sequence.input_ids[: sequence.prompt_length]
                assert rollout.generate([prompt], 0) == [sequence.input_ids[sequence.prompt_length :]]
                written += 1
    assert written == 8
    total = sum(
        dense_loss(trainer.model, models[name], s).item() * sum(x.num_targets for x in s)
        for name, s in by_teacher.items()
    )
    assert losses(trainer) == pytest.approx([total / sum(s.num_targets for s in window)], rel=1e-5)
    assert {f"eval_teacher/{name}/divergence" for name in names} <= set(trainer.state.log_history[-2])


def test_the_teachers_answers_are_kept_apart(base, adapters, tmp_path):
    """The same prompts for both teachers: a cache that did not know whose an answer is would give the other's."""
    rows = tiny_rows(4)
    both = Dataset.from_list([{**row, "teacher": name} for row in rows for name in ("math", "chat")])
    two = {name: adapters[name] for name in ("math", "chat")}
    trainer = trainer_on(
        tmp_path, student_of(base), both, share_base_model=True, teacher_adapters=two, lmbda=0.0, seq_kd=True
    )
    prompts = [row["input_ids"][: row["prompt_length"]] for row in trainer.train_dataset]
    numbers = list(trainer.train_dataset["teacher"])
    first = trainer.rollouts["teacher"].generate(prompts, 0, list(range(8)), numbers)
    answers = {(tuple(p), n): c for p, n, c in zip(prompts, numbers, first, strict=True)}
    assert all(answers[tuple(p), 0] != answers[tuple(p), 1] for p in prompts)
    assert trainer.rollouts["teacher"].generate(prompts, 5, list(range(8)), numbers) == first
    stores = {one.store.path for one in trainer.rollouts["teacher"].by_teacher}
    assert len(stores) == 2


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_adapters": {"a": "x"}, "teacher_adapter_name_or_path": "y"}, "exclude each other"),
        ({"teacher_adapters": "math"}, "teacher_adapters='math'"),
        ({"teacher_adapters": "{}"}, "should be a dict"),
        ({"teacher_adapters": {"a b": "x"}}, "no names"),
        ({"teacher_adapters": {"a": 3}}, "no adapters"),
        ({"share_base_model": True, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "no effect with share_base"),
        ({"share_base_model": True, "teacher_placement": "cpu_offload"}, "teacher_placement='cpu_offload'"),
        (
            {"share_base_model": True, "teacher_server_url": "http://localhost:1", "teacher_top_k": 8},
            "does not go with teacher_server_url",
        ),
    ],
)
def test_fields_that_do_not_go_together(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        GKDConfig(str(tmp_path), **values)


def test_adapters_by_flag(tmp_path):
    args = GKDConfig(str(tmp_path), teacher_adapters='{"math": "adapters/math", "none": null}')
    assert args.teacher_adapters == {"math": "adapters/math", "none": None}
    assert args.teacher_names == ("math", "none")


def test_a_student_whose_base_would_change_is_refused(base, tmp_path):
    for student, words in (
        (tiny_model(seed=1), "full fine-tuning changes the weights"),
        (student_of(base, bias="all"), "trains .* parameters of the base itself"),
        (student_of(base, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_on(tmp_path, student, share_base_model=True)
    with pytest.raises(ValueError, match="share_base_model=True, but the teacher is 'other'"):
        trainer_on(tmp_path, student_of(base), share_base_model=True, teacher_model_name_or_path="other")
    spread = student_of(base)
    spread.get_base_model().hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="over 2 devices"):
        second_model(spread)
    with pytest.raises(ValueError, match="teacher_model is a model"):
        trainer_on(tmp_path, student_of(base), teacher=tiny_model(), share_base_model=True)


def test_adapters_that_cannot_be_used_are_refused(base, adapters, tmp_path):
    other = make_adapter(tmp_path / "other", 3, tiny_model(hidden=48, seed=2))
    deeper = make_adapter(tmp_path / "deeper", 3, tiny_model(layers=3, seed=1))
    biased = make_adapter(tmp_path / "biased", 3, tiny_model(seed=1), bias="all")
    prompts = get_peft_model(tiny_model(seed=1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path / "prompts")
    pickled = Path(make_adapter(tmp_path / "pickled", 3))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    for folder, words in (
        (other, "does not fit the model"),
        (deeper, "does not fit the model"),
        (biased, "bias='all'"),
        (str(tmp_path / "prompts"), "changes the prompt"),
        (str(pickled), "a pickle may run any program"),
        (base, "it is a whole model"),
        (str(tmp_path / "nowhere"), "neither a folder nor an adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_on(tmp_path, student_of(base), share_base_model=True, teacher_adapter_name_or_path=folder)


def test_a_row_without_a_known_teacher_is_named(base, adapters, tmp_path):
    common = {"share_base_model": True, "teacher_adapters": adapters}
    good = rows_of(["math", "chat"])
    with pytest.raises(ValueError, match=r"row 2, column 'teacher': is 'maths', .* math, chat, plain"):
        trainer_on(tmp_path, student_of(base), rows_of(["math", "chat", "maths"]), **common)
    with pytest.raises(ValueError, match=r"row 0, column 'teacher': is missing: .* math, chat, plain"):
        trainer_on(tmp_path, student_of(base), **common)
    with pytest.raises(ValueError, match="eval data set, row 0, column 'teacher': is missing"):
        trainer_on(tmp_path, student_of(base), good, eval_dataset=Dataset.from_list(tiny_rows(2)), **common)
    with pytest.raises(ValueError, match="data_collator of your own"):
        trainer_on(tmp_path, student_of(base), good, data_collator=lambda rows: rows, **common)
