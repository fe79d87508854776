"""The user's config stays as it was given, whatever is made of it: trainers, commands, TRL and transformers set fields
of a copy."""

import copy

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import config
from user import flags, user_folder

from gkd.commands.doctor.examine import examine
from gkd.commands.evaluate import evaluate_recipe
from gkd.commands.plan.plan import plan
from gkd.commands.precompute.answers import precompute
from gkd.recipe.build import build_trainer
from gkd.recipe.capture import capture
from gkd.recipe.rows import recipe_data
from gkd.training.trainer import GKDTrainer

RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

def load_data(settings):
    return with_held_out(dataset_by_name(settings))

if __name__ == "__main__":
    run(load_data)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = user_folder(tmp_path_factory.mktemp("user"))
    (path / "recipe.py").write_text(RECIPE)
    return path


def fields(args):
    """All of them, those that no constructor takes too; what is written out by value."""
    values = {
        name: copy.deepcopy(value) if isinstance(value, (dict, list)) else value for name, value in vars(args).items()
    }
    return values, args.to_dict()


def test_a_trainer_leaves_the_config_as_it_was(folder, tmp_path):
    """By name and as a model, with an adapter and checkpointing, for which TRL fills in a dictionary."""
    rows = Dataset.from_list(tiny_rows(8))
    for student in (str(folder / "student"), tiny_model(seed=1)):
        values = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(student, str) else {}
        args = config(
            tmp_path / "out",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={},
            eval_strategy="steps",
            eval_steps=1,
            max_length=64,
            generation_kwargs={"no_repeat_ngram_size": 3},
            dataset_kwargs={},
            **values,
        )
        before = fields(args)
        trainer = GKDTrainer(
            student,
            tiny_model(seed=2),
            args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(target_modules="all-linear"),
        )
        trainer.train()
        trainer.lmbda = 0.25
        assert fields(args) == before
        assert trainer.args.remove_unused_columns is False, "nothing was set at all"
        assert trainer.args.lmbda == 0.25


def settings_after(folder, output, act, **values):
    recipe = capture(folder / "recipe.py", flags(folder, output, **values))
    before = fields(recipe.settings.training), copy.copy(vars(recipe.settings.model))
    act(recipe)
    return (fields(recipe.settings.training), vars(recipe.settings.model)), before


@pytest.mark.parametrize(
    ("act", "values"),
    [
        (lambda recipe: build_trainer(recipe.settings, recipe_data(recipe.load_data, recipe.settings)), {}),
        (examine, {"gradient_accumulation_steps": 2}),
        (lambda recipe: evaluate_recipe(recipe, None), {"use_peft": True}),
        (precompute, {"seq_kd": True}),
        (lambda recipe: plan(recipe, gpus=1, gpu_memory="8GB"), {}),
    ],
    ids=["trainer of a recipe", "doctor", "evaluate", "precompute", "plan"],
)
def test_a_command_leaves_the_settings_as_they_were(folder, tmp_path, act, values):
    after, before = settings_after(folder, tmp_path / "out", act, **values)
    assert after == before


def test_a_copy_has_dictionaries_of_its_own_and_the_same_device_and_plan(tmp_path):
    args = config(tmp_path, generation_kwargs={"top_h": 0.5}, report_to=[])
    own = copy.copy(args)
    own.generation_kwargs["top_h"] = 0.9
    own.report_to.append("tensorboard")
    own.lmbda = 1.0
    assert (args.generation_kwargs, args.report_to, args.lmbda) == ({"top_h": 0.5}, [], 0.5)
    assert own.distributed_state is args.distributed_state
    assert own.device == args.device
