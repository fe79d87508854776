"""docs/coming_from_trl.md is true of the installed TRL: no field is missing, and the trainers run side by side."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from training import Remember, change, config, dense_loss, losses, trainer_of
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig as TheirConfig
from trl.experimental.gkd import GKDTrainer as TheirTrainer
from trl.experimental.utils import DataCollatorForChatML
from trl.trainer.base_config import _BaseConfig

from gkd.config.fields import GKDConfig
from gkd.config.values import _INEFFECTIVE
from gkd.training.trainer import GKDTrainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")
# ChatML without the line break behind an answer: TRL trains on what a template writes there, this package does not.
PLAIN = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
ONE_TOKEN = 70
ALL_OTHERS = [i for i in range(VOCABULARY) if i != ONE_TOKEN]  # suppressed, they leave completions of one token


def section(heading):
    start = PAGE.index(f"\n## {heading}\n")
    end = PAGE.find("\n## ", start + 1)
    return PAGE[start : end if end > 0 else len(PAGE)]


def rows_of(heading):
    """{field: the rest of the line} of the tables of a section; a line may name several fields."""
    found = {}
    for line in section(heading).splitlines():
        if line.startswith("| `"):
            names, rest = line[2:].split(" | ", 1)
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), rest)
    return found


def own_fields(kind, parent):
    return {field.name for field in dataclasses.fields(kind)} - {field.name for field in dataclasses.fields(parent)}


# ------------------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("theirs", [TheirTrainer, DistillationTrainer, SFTTrainer])
def test_every_argument_of_their_constructors_is_taken_or_has_a_line(theirs):
    taken = set(inspect.signature(GKDTrainer.__init__).parameters)
    assert set(inspect.signature(theirs.__init__).parameters) <= taken | set(rows_of("Arguments of the constructors"))


def test_every_attribute_and_method_of_their_gkd_trainer_has_a_line(tmp_path):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    options = {"report_to": "none", "use_cpu": True, "bf16": False}
    common = {"train_dataset": rows, "processing_class": tiny_tokenizer()}
    gkd = TheirTrainer(tiny_model(seed=1), tiny_model(seed=2), TheirConfig(str(tmp_path), **options), **common)
    sft = SFTTrainer(tiny_model(seed=1), SFTConfig(str(tmp_path), **options), **common)
    own = {name for name in {*vars(gkd), *vars(TheirTrainer)} if not name.startswith("_")} - set(vars(sft))
    assert {"lmbda", "generation_config", "generate_on_policy_outputs"} <= own
    assert own <= set(rows_of("Attributes and methods")), own - set(rows_of("Attributes and methods"))


def test_every_field_of_their_gkd_config_has_a_line():
    assert set(rows_of("`trl.experimental.gkd.GKDConfig`")) == own_fields(TheirConfig, SFTConfig)


def test_every_field_of_distillation_config_has_a_line():
    changed = {"learning_rate", "remove_unused_columns"}  # of TrainingArguments, with another default
    found = set(rows_of("`trl.DistillationConfig`"))
    assert found - changed == own_fields(DistillationConfig, _BaseConfig)
    assert changed <= found


def test_every_field_of_sft_config_has_a_line():
    inherited = {field.name for field in dataclasses.fields(_BaseConfig)}  # of which the page names a few, too
    assert set(rows_of("Fields of `SFTConfig`")) - inherited == own_fields(SFTConfig, _BaseConfig)


@pytest.mark.parametrize(("name", "remedy"), [(name, remedy) for name, _, remedy in _INEFFECTIVE])
def test_what_is_refused_says_so_in_its_line(name, remedy):
    assert "refused" in rows_of("Fields of `SFTConfig`")[name], remedy


def test_the_shared_defaults_are_the_same():
    theirs, ours = TheirConfig("out", bf16=False), GKDConfig("out", bf16=False)
    own = own_fields(TheirConfig, SFTConfig)
    assert {name: getattr(theirs, name) for name in own} == {name: getattr(ours, name) for name in own}
    assert (theirs.learning_rate, theirs.max_length) == (ours.learning_rate, ours.max_length)


# ------------------------------------------------------------------------------------------------- side by side


def chats(answers):
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]}
            for i, answer in enumerate(answers)
        ]
    )


def their_trainer(folder, rows, template=PLAIN, peft_config=None, student=None, **values):
    base = config(folder)
    kept = ("per_device_train_batch_size", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm", "seed")
    common = {name: getattr(base, name) for name in (*kept, "max_new_tokens", "max_length", "max_steps")}
    common |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "bf16": False}
    args = TheirConfig(str(folder), use_cpu=True, **{**common, "gradient_checkpointing": False, **values})
    return TheirTrainer(
        model=student or tiny_model(seed=1),
        teacher_model=tiny_model(hidden=48, layers=3, seed=2),
        args=args,
        train_dataset=rows,
        processing_class=tiny_tokenizer(chat_template=template),
        peft_config=peft_config,
    )


def our_trainer(folder, rows, template=PLAIN, **values):
    return GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(hidden=48, layers=3, seed=2),
        args=config(folder, **values),
        train_dataset=rows,
        processing_class=tiny_tokenizer(chat_template=template),
    )


RAGGED = ["one", "two words", "a rather longer answer than these", "é!"] * 2


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_on_data_loss_and_gradient_are_theirs(tmp_path, beta):
    """Ragged rows, two micro-batches: the same sum over the same targets, divided by the same number."""
    values = {"lmbda": 0.0, "beta": beta, "gradient_accumulation_steps": 2}
    theirs, ours = their_trainer(tmp_path, chats(RAGGED), **values), our_trainer(tmp_path, chats(RAGGED), **values)
    # eight rows, one step of eight: the order does not matter; theirs draws `random.random() <= 0.0`
    step_theirs, step_ours = change(theirs), change(ours)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert (step_ours - step_theirs).abs().max() < 1e-4 * step_theirs.abs().max()


def test_they_train_on_what_the_template_writes_behind_the_stop_token():
    rows = chats(["one", "two words"])
    tokenizer = tiny_tokenizer()  # its template ends every turn with <|im_end|> and a line break
    theirs = DataCollatorForChatML(tokenizer=tokenizer, max_length=64)(list(rows))
    for labels, answer in zip(theirs["labels"], ("one", "two words"), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>\n"


def test_we_stop_at_the_stop_token(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    our_trainer(tmp_path, chats(["one"] * 4), template=tiny_tokenizer().chat_template, lmbda=0.0).train()
    assert [s.num_targets for s in memory.windows[0]] == [len("one") + 1] * 4


@pytest.mark.parametrize("answer", ["abc", "abcdefghijklmnopqrstuvwxyz"])
def test_their_on_policy_loss_is_divided_by_the_length_of_answers_that_are_not_used(tmp_path, monkeypatch, answer):
    memory = Remember(monkeypatch)
    values = {"lmbda": 1.0, "max_new_tokens": 6, "learning_rate": 0.0}
    theirs = their_trainer(tmp_path, chats([answer] * 4), **values)
    theirs.generation_config.suppress_tokens = ALL_OTHERS
    theirs.train()
    ours = our_trainer(tmp_path, chats([answer] * 4), generation_kwargs={"suppress_tokens": ALL_OTHERS}, **values)
    ours.train()
    expected = dense_loss(ours.model, ours.teacher_model, memory.windows[0]).item()
    assert losses(ours)[0] == pytest.approx(expected, rel=1e-4)
    # six tokens are trained on in each row; theirs is divided by the answer's letters and its stop token
    assert losses(theirs)[0] == pytest.approx(expected * 6 / (len(answer) + 1), rel=1e-3)


def test_on_policy_at_temperature_1_loss_and_gradient_are_distillation_trainers(tmp_path, monkeypatch):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"say {i}" * (i + 1)}]} for i in range(4)])
    only = {"suppress_tokens": ALL_OTHERS}
    args = DistillationConfig(
        str(tmp_path),
        max_completion_length=6,
        generation_kwargs=only,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )
    tokenizer = tiny_tokenizer(chat_template=PLAIN)
    models = {"model": tiny_model(seed=1), "teacher_model": tiny_model(hidden=48, layers=3, seed=2)}
    theirs = DistillationTrainer(**models, args=args, train_dataset=rows, processing_class=tokenizer)
    generate, modes = models["model"].generate, []
    monkeypatch.setattr(
        models["model"], "generate", lambda *a, **k: (modes.append(models["model"].training), generate(*a, **k))[1]
    )
    ours = our_trainer(
        tmp_path,
        rows,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        generation_kwargs=only,
    )
    step_theirs, step_ours = change(theirs), change(ours)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert (step_ours - step_theirs).abs().max() < 1e-4 * step_theirs.abs().max()
    assert modes == [True]  # one rollout for both micro-batches, in training mode


def test_their_rollouts_have_no_cache_and_one_stop_token_only(tmp_path):
    theirs = their_trainer(tmp_path, chats(RAGGED), gradient_checkpointing=True)
    assert theirs.generation_config.use_cache is False
    student = tiny_model(seed=1)
    student.generation_config.eos_token_id = 256
    args = config(tmp_path)
    ours = GKDTrainer(
        student, tiny_model(seed=2), args, train_dataset=chats(RAGGED), processing_class=tiny_tokenizer()
    )
    theirs = their_trainer(tmp_path, chats(RAGGED), student=student)
    assert theirs.generation_config.eos_token_id == 256  # not the <|im_end|> that ends a turn of the template
    assert set(ours.rollouts["student"].settings.stop_ids) == {256, 258}


def test_their_rollouts_take_what_is_not_set_from_the_students_generation_config(tmp_path, monkeypatch):
    student = tiny_model(seed=1)
    student.generation_config.update(repetition_penalty=1.1, min_p=0.1)
    theirs = their_trainer(tmp_path, chats(RAGGED), student=student, lmbda=1.0)
    make_processors, seen = type(student)._get_logits_processor, []

    def spy(model, generation_config, *args, **kwargs):
        seen.append((generation_config.repetition_penalty, generation_config.min_p))
        return make_processors(model, generation_config, *args, **kwargs)

    monkeypatch.setattr(type(student), "_get_logits_processor", spy)
    theirs.train()
    assert seen == [(1.1, 0.1)]
    args = config(tmp_path)
    ours = GKDTrainer(
        student, tiny_model(seed=2), args, train_dataset=chats(RAGGED), processing_class=tiny_tokenizer()
    )
    settings = ours.rollouts["student"].settings
    assert (settings.repetition_penalty, settings.min_p, settings.top_k, settings.top_p) == (1.0, None, 0, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_static_loss_is_theirs_at_every_beta(beta, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 7, 11) * 3
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :4] = -100
    for reduction in ("batchmean", "sum", "mean"):
        options = {"beta": beta, "temperature": temperature, "reduction": reduction}
        theirs = TheirTrainer.generalized_jsd_loss(student, teacher, labels, **options)
        ours = GKDTrainer.generalized_jsd_loss(student, teacher, labels, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_their_disable_dropout_takes_the_adapters_dropout_too(tmp_path):
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = their_trainer(tmp_path, chats(RAGGED), peft_config=lora)
    ours = trainer_of(tmp_path, chats(RAGGED), peft_config=lora)

    def probabilities(trainer):
        return {
            module.p
            for name, module in trainer.model.named_modules()
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
        }

    assert probabilities(theirs) == {0.0}
    assert probabilities(ours) == {0.3}


def test_their_prompt_loses_what_a_long_answer_takes():
    tokenizer = tiny_tokenizer(chat_template=PLAIN)
    kept = []
    for answer in ("x", "x" * 30):
        collator = DataCollatorForChatML(tokenizer=tokenizer, max_length=40)
        prompt = collator(list(chats([answer])))["prompts"][0]
        kept.append(tokenizer.decode(prompt))
    assert "say 0" in kept[0]
    assert "say 0" not in kept[1]


def test_ours_does_not(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    values = {"lmbda": 1.0, "max_length": 60, "max_new_tokens": 4}
    our_trainer(tmp_path, chats(["x" * 50] * 4), **values).train()
    tokenizer = tiny_tokenizer()
    assert all("say" in tokenizer.decode(s.input_ids[: s.prompt_length]) for s in memory.windows[0])


def test_heads_of_different_size_are_refused_there_and_compared_here(tmp_path):
    wide = {"teacher_model": tiny_model(vocab=VOCABULARY + 5, seed=2)}
    rows, tokenizer = chats(RAGGED), tiny_tokenizer(chat_template=PLAIN)
    with pytest.raises(ValueError, match="vocab_size"):
        TheirTrainer(
            model=tiny_model(seed=1),
            **wide,
            args=TheirConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[]),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    ours = GKDTrainer(
        model=tiny_model(seed=1), **wide, args=config(tmp_path), train_dataset=rows, processing_class=tokenizer
    )
    assert ours.loss_settings.shared_vocab == VOCABULARY
