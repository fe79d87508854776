"""Launches that cannot train, or would train something else, are refused before anything is loaded."""

import pytest
from accelerate import ParallelismConfig
from datasets import Dataset
from tiny import tiny_model, tiny_rows
from training import config, trainer_of

from gkd.assembly.launch_checks import check_launch, check_tasks
from gkd.assembly.models import resolve_config
from gkd.models.placement import check_not_split
from gkd.training.trainer import GKDTrainer

TASKS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in TASKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "who"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "srun"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, "srun"),  # an older SLURM: a task that is not the first
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "8"}, "mpirun"),
    ],
)
def test_tasks_that_do_not_know_of_each_other_are_refused(environment, who, monkeypatch, tmp_path):
    args = config(tmp_path)  # first: on CPUs accelerate would look for the other tasks of mpirun, on GPUs it does not
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{who} started several tasks .* set WORLD_SIZE=1"):
        GKDTrainer(model="nowhere", teacher_model="nowhere", args=args)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="report_to='neptune': its package is not installed here"):
        GKDTrainer(model="nowhere", teacher_model="nowhere", args=config(tmp_path, report_to=["neptune"]))


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        ({}, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1),  # the script of a batch job, before any srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "WORLD_SIZE": "1"}, 1),  # runs of their own, on purpose
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "16"}, 16),  # torchrun in each task
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),  # accelerate joins these on CPUs
    ],
)
def test_tasks_that_are_one_or_joined_are_fine(environment, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_tasks(joined)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ddp_static_graph": True}, "ddp_static_graph=True .* leave it out"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches.* Leave it out"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size=2: models or sequences .* ZeRO-3"),
        ({"parallelism_config": ParallelismConfig(cp_size=4)}, "cp_size=4"),
        ({"parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed")}, "sp_size=2"),
        ({"model_init_kwargs": {"tp_plan": "auto"}}, "tp_plan='auto'"),
    ],
)
def test_options_that_would_give_other_numbers_are_refused(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_launch(config(tmp_path, **values))


def test_parallelism_of_the_launch_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    check_launch(config(tmp_path))
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match="PARALLELISM_CONFIG_CP_SIZE=2"):
        check_launch(config(tmp_path))


def test_several_gpus_need_a_launcher(tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match=r"2 GPUs are visible .*accelerate launch --num_processes 2"):
        check_launch(args)


def test_a_student_by_name_is_never_spread_over_gpus(tmp_path):
    assert resolve_config(config(tmp_path), "some/model").model_init_kwargs["device_map"] is None
    asked = config(tmp_path, model_init_kwargs={"device_map": {"": 0}})
    assert resolve_config(asked, "some/model").model_init_kwargs["device_map"] == {"": 0}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_a_device_map_has_spread_is_refused(role, tmp_path):
    model = tiny_model(seed=1)
    model.hf_device_map = {"": "cpu"}
    check_not_split(model, role)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    with pytest.raises(ValueError, match=f"spread the {role} over 0, 1.*accelerate launch"):
        trainer_of(tmp_path, **{role: model})


def test_layer_kernels_of_liger_are_taken_and_its_loss_is_not(tmp_path, monkeypatch):
    """Not its loss: the head's forward pass is ours. Looked at is what the Trainer hands to Liger (not here)."""
    asked = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda _model, given: asked.append(given))
    trainer_of(tmp_path, use_liger_kernel=True, completion_only_loss=True).train()
    assert asked == [{"fused_linear_cross_entropy": False}]
    with pytest.raises(ValueError, match="completion_only_loss=False is not supported"):
        config(tmp_path, completion_only_loss=False)


@pytest.mark.parametrize("values", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 2}])
def test_no_full_batch_is_refused(values, tmp_path):
    with pytest.raises(ValueError, match=r"dataloader_drop_last=True with 3 usable rows and .*_batch_size=4"):
        trainer_of(tmp_path, Dataset.from_list(tiny_rows(3)), dataloader_drop_last=True, **values)
    trainer_of(tmp_path, Dataset.from_list(tiny_rows(4)), dataloader_drop_last=True, **values).train()
