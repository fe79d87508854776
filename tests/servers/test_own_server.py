"""A server that the run starts itself: it is there when it is needed, and gone when the run is.

Against the stand-in (a real process with vLLM's flags and formats) everywhere, and against vLLM itself by
`make test-vllm`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from served import AtStep
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import change, config
from vllm_server.serve import INSTALLED, PYTHON

from gkd.assembly.own_servers import check_room, gpus_of, order_of
from gkd.config.servers import with_served_teacher
from gkd.rollouts.hf import HFRollout
from gkd.servers import own
from gkd.servers.client import ServerError, VLLMClient
from gkd.servers.engine import EngineOrder, devices_of_servers, rank_of_server
from gkd.servers.own import OwnServer, free_port
from gkd.training.trainer import GKDTrainer

SUPPORT = Path(__file__).resolve().parents[1] / "support"
REAL = bool(os.environ.get("GKD_TEST_VLLM") and INSTALLED.exists())
ENGINES = [
    "stand-in",
    pytest.param("vllm", marks=pytest.mark.skipif(not REAL, reason="make test-vllm runs this")),
]


@pytest.fixture(params=ENGINES)
def python(request, monkeypatch):
    """The interpreter of an environment that has vLLM, or what stands in for it."""
    if request.param == "vllm":
        return str(PYTHON)
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT / 'stand_in'}:{os.environ.get('PYTHONPATH', '')}")
    return sys.executable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "qwen3", hidden=64)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for server in own._running.values():
        server.stop()
    own._running.clear()


def trainer_with(tmp_path, folder, lora, given=True, **values):
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False) if lora else None
    defaults = {"lmbda": 1.0, "temperature": 0.0, "max_steps": 4, "max_length": 200, "bf16": False}
    defaults |= {"learning_rate": 5.0 if lora else 0.5, "max_prompt_length": 150}
    torch.manual_seed(6)
    return GKDTrainer(
        model=folder,
        teacher_model=tiny_model(hidden=48, layers=3, seed=2) if given else None,
        args=config(tmp_path, **(defaults | values)),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=adapter,
    )


def started_by(tmp_path, folder, python, lora, **values):
    fields = {"rollout_backend": "vllm", "rollout_server": "auto", "vllm_python": python}
    if python == str(PYTHON):
        fields["vllm_args"] = "--max-num-seqs 8"
    return trainer_with(tmp_path, folder, lora, **fields, **values)


def processes_with(word):
    """Ids of the processes whose command line holds the word."""
    lines = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if word in line and "ps -ewwo" not in line]


def until(what, seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_rollouts_of_a_server_that_the_run_starts_are_the_students_own(tmp_path, folder, python, lora):
    """Greedy, four steps: the completions, and the weights in the end, are those of rollouts in this process."""
    trainer = started_by(tmp_path / "a", folder, python, lora)
    rollout, seen = trainer.rollouts["student"], []
    generate = rollout.generate
    reference = HFRollout(lambda: trainer.model_wrapped, None, rollout.settings, seed=4)

    def compared(prompts, step, rows=None, teachers=None):
        completions = generate(prompts, step, rows)
        seen.append((completions == reference.generate(prompts, step, rows), rollout.upload.name.split("-")[2:]))
        return completions

    rollout.generate = compared
    changed = change(trainer)
    assert [same for same, _ in seen] == [True] * 4
    assert [step for _, (step, _) in seen] == ["0", "1", "2", "3"]
    assert len({digest for _, (_, digest) in seen}) == 4
    expected = change(trainer_with(tmp_path / "b", folder, lora))
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_a_server_that_is_killed_is_started_again_and_the_run_goes_on(tmp_path, folder, python, lora):
    """In the middle of the training; the rollouts after it are from the present weights again."""
    if lora and python != str(PYTHON):
        pytest.skip("an adapter that a server has lost: tests/servers/test_client.py")
    trainer = started_by(tmp_path / "a", folder, python, lora)
    [server] = own._running.values()
    killed = []

    def kill():
        killed.extend(processes_with(f"--port {server.order.port}"))
        for pid in killed:
            if pid != server.process.pid:
                os.kill(pid, signal.SIGKILL)

    trainer.add_callback(AtStep(2, kill))
    changed = change(trainer)
    assert killed
    assert "it is started again, 2 more times" in server.log.read_text()
    expected = change(trainer_with(tmp_path / "b", folder, lora))
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_server_that_dies_for_good_ends_the_run_with_a_checkpoint(tmp_path, folder, python):
    trainer = started_by(tmp_path / "a", folder, python, True)
    [server] = own._running.values()
    trainer.add_callback(AtStep(2, server.stop))
    Path(server.address.ended).write_text("it ended with status 1")  # as its keeper writes
    with pytest.raises(ServerError, match=r"the server of this run is gone: it ended with status 1.*rollout-0\.log"):
        trainer.train()
    assert (tmp_path / "a" / "checkpoint-2").is_dir()


def test_a_teacher_on_a_server_that_the_run_starts_is_the_one_in_this_process(tmp_path, folder, python):
    """Its top 32, and what it writes: the weights after two steps are the same."""
    teacher = save_tiny(tmp_path / "teacher", "qwen3", hidden=64, layers=3, seed=2)
    values = {"lmbda": 0.5, "seq_kd": True, "max_steps": 2, "teacher_top_k": 20, "teacher_model_name_or_path": teacher}
    values |= {"learning_rate": 0.5}
    own_args = "--max-num-seqs 8" if python == str(PYTHON) else None
    trainer = trainer_with(
        tmp_path / "a",
        folder,
        True,
        given=False,
        teacher_server="auto",
        vllm_python=python,
        vllm_args=own_args,
        **values,
    )
    assert trainer.teacher_model is None
    changed = change(trainer)
    expected = change(trainer_with(tmp_path / "b", folder, True, given=False, **values))
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


SCRIPT = """
import sys
from pathlib import Path
from gkd.servers.engine import EngineOrder
from gkd.servers.own import OwnServer
model, python, port, log = sys.argv[1:]
server = OwnServer(EngineOrder(model, python, int(port), dtype="float32", max_model_len=128), Path(log))
server.wait()
print("ready", flush=True)
sys.stdin.readline()
raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "exit"])
def test_no_process_is_left_when_the_run_is_gone(tmp_path, folder, python, how):
    """Neither the server, nor what it started, however the run ended."""
    if python == str(PYTHON) and how != "SIGKILL":
        pytest.skip("the engine's part is the same")
    port, log = free_port(), tmp_path / "rollout.log"
    words = [sys.executable, "-c", SCRIPT, folder, python, str(port), str(log)]
    run = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout.readline() == "ready\n"
    server = processes_with(f"--port {port}")
    assert len(server) >= 2  # the keeper's own command line holds it, too
    group = os.getpgid(max(server))
    if how == "exit":
        run.stdin.close()
    else:
        run.send_signal(getattr(signal, how))
    run.wait(60)
    assert until(lambda: not processes_with(f"--port {port}"))
    assert until(lambda: not members_of(group))
    assert not (tmp_path / "rollout.ended").exists()


def members_of(group):
    lines = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines[1:] if int(line.split()[0]) == group and not line.split()[1].startswith("Z")]


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_a_server_dies_of_at_its_start_is_told_and_it_is_not_tried_again(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT / "stand_in"))
    order = EngineOrder(folder, sys.executable, free_port(), extra="--dies no-such-flag")
    server = OwnServer(order, tmp_path / "rollout.log")
    with pytest.raises(ValueError, match=r"did not start. The end of .*rollout.log:\nValueError: no-such-flag"):
        server.wait()
    assert (tmp_path / "rollout.ended").read_text() == "it ended with status 1"
    assert "started again" not in server.log.read_text()


@pytest.mark.parametrize(
    ("python", "message"),
    [("/no/such/python", "cannot be run"), (sys.executable, "has no vLLM"), ("/bin/false", "no Python interpreter")],
)
def test_an_environment_without_vllm_is_refused_with_the_remedy(tmp_path, python, message):
    with pytest.raises(ValueError, match=f"vllm_python='{python}'.*{message}"):
        OwnServer(EngineOrder("model", python, 1), tmp_path / "rollout.log")


AUTO = {"rollout_backend": "vllm", "rollout_server": "auto"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout_server": "auto"}, "rollout_server='auto' has no effect without rollout_backend='vllm'"),
        (AUTO | {"rollout_server_url": "http://a"}, "does not go with rollout_server_url"),
        (AUTO | {"rollout_server": "yes"}, "rollout_server='yes'.*auto"),
        (AUTO | {"rollout_server_sharing": "nap"}, "rollout_server_sharing='nap'.*sleep"),
        (AUTO | {"rollout_server_sharing": "sleep", "rollout_staleness": 1}, "does not go with rollout_staleness=1"),
        ({"teacher_server": "auto", "teacher_model_name_or_path": "t"}, "teacher_server needs teacher_top_k"),
        ({"teacher_server": "auto", "teacher_top_k": 4, "share_base_model": True}, "teacher_server"),
        (
            {"teacher_server": "auto", "teacher_top_k": 4, "teacher_server_url": "http://a"},
            "does not go with teacher_ser",
        ),
        (AUTO | {"rollout_server_memory": 1.5}, "rollout_server_memory=1.5 is out of range"),
        ({"rollout_server_memory": 0.5}, "rollout_server_memory=0.5 has no effect"),
        ({"vllm_python": "python"}, "vllm_python='python' has no effect"),
        ({"vllm_args": "-tp 2"}, "vllm_args='-tp 2' has no effect"),
        ({"rollout_server_sharing": "sleep"}, "rollout_server_sharing has no effect"),
    ],
)
def test_fields_without_effect_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **values)


def test_a_server_on_a_cpu_does_not_sleep(tmp_path, folder):
    with pytest.raises(ValueError, match="a vLLM server on a CPU does not sleep"):
        started_by(tmp_path, folder, sys.executable, True, rollout_server_sharing="sleep")


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("visible", "ranks", "asked", "rollout", "teacher"),
    [
        ("0123", 3, "rollouts", "3", ""),
        ("0123", 1, "rollouts", "123", ""),
        ("0123", 4, "rollouts shared", "0123", ""),
        ("45", 1, "rollouts shared", "4", ""),
        ("0123", 2, "teacher", "", "23"),
        ("01234567", 3, "rollouts teacher", "345", "67"),
        ("01234567", 4, "rollouts shared teacher", "0123", "4567"),
        ("", 2, "rollouts teacher", "", ""),  # on CPUs
    ],
)
def test_a_server_gets_the_gpus_that_are_left_or_those_that_train(visible, ranks, asked, rollout, teacher):
    flags = {name: name in asked for name in ("rollouts", "shared", "teacher")}
    found = devices_of_servers(list(visible), ranks, **flags)
    assert found == {"rollout": tuple(rollout), "teacher": tuple(teacher)}


def test_a_teachers_server_keeps_its_gpus_when_that_of_the_rollouts_is_started_behind_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = config(tmp_path, **AUTO, teacher_server="auto", teacher_model_name_or_path="some/teacher", teacher_top_k=4)
    before = gpus_of(args, "rollout"), gpus_of(args, "teacher")
    assert before == (("2",), ("3",))
    url = own.remember([own.Address("http://127.0.0.1:4", "a-key-of-this-run", str(tmp_path / "teacher.ended"))])
    assert gpus_of(with_served_teacher(args, url), "rollout") == before[0]


@pytest.mark.parametrize(("ranks", "teacher"), [(2, False), (1, True)])
def test_no_gpu_left_is_a_mistake(ranks, teacher):
    with pytest.raises(ValueError, match=r"rollout_server='auto'.*of the 2 GPUs.*rollout_server_sharing='sleep'"):
        devices_of_servers(["0", "1"], ranks, rollouts=True, shared=False, teacher=teacher)


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (2, 8), (8, 8), (9, 16), (512, 512)])
def test_ranks_are_rounded_up_to_what_vllm_knows(rank, size):
    assert rank_of_server(rank) == size


def test_a_rank_above_all_is_refused():
    with pytest.raises(ValueError, match="lora_r=513"):
        rank_of_server(513)


@pytest.mark.parametrize(
    ("extra", "replicas"),
    [("", "4"), ("--tensor-parallel-size=2", "2"), ("-tp 4", None), ("--data-parallel-size 3", None)],
)
def test_the_model_is_copied_onto_all_gpus_unless_it_is_split(extra, replicas):
    flags = EngineOrder("m", "python", 1, devices=tuple("0123"), extra=extra).flags()
    own_part = flags[: len(flags) - len(extra.split())]
    assert (
        own_part[own_part.index("--data-parallel-size") + 1] if "--data-parallel-size" in own_part else None
    ) == replicas


def test_gpus_that_a_split_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="--tensor-parallel-size 3 does not divide the 4 GPUs 0,1,2,3"):
        EngineOrder("m", "python", 1, devices=tuple("0123"), extra="-tp 3").flags()


def test_the_fields_become_flags(tmp_path):
    args = config(tmp_path, **AUTO, max_prompt_length=40, max_new_tokens=24, rollout_server_sharing="sleep",
                  vllm_args="--max-num-seqs 8")  # fmt: skip
    order = order_of(args, "some/model", 12, ("0", "1"))
    shown = order.shown()
    for part in (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_SERVER_DEV_MODE=1", "CUDA_VISIBLE_DEVICES=0,1",
        "vllm serve some/model", "--enable-lora --max-lora-rank 16", "--max-model-len 64", "--enable-sleep-mode",
        "--gpu-memory-utilization 0.4", "--data-parallel-size 2", "--max-num-seqs 8", "--generation-config vllm",
    ):  # fmt: skip
        assert part in shown
    whole = order_of(config(tmp_path, **AUTO, rollout_server_memory=0.7), "some/model", None, ("0",)).shown()
    assert "--enable-lora" not in whole
    assert "VLLM_SERVER_DEV_MODE=1" in whole
    assert "--gpu-memory-utilization 0.7" in whole
    with pytest.raises(ValueError, match="made in memory"):
        order_of(args, None, 8, ())


def test_memory_that_the_models_have_taken_is_told_before_the_first_step():
    check_room(50, 100, 0.4)
    with pytest.raises(ValueError, match=r"rollout_server_memory=0.4 is 32.0 GB of this GPU, and 20.0 GB are free"):
        check_room(20 * 10**9, 80 * 10**9, 0.4)


def test_the_key_of_an_own_server_is_sent_and_never_shown(tmp_path):
    address = own.Address("http://127.0.0.1:1", "secret-key-of-this-run", str(tmp_path / "x.ended"))
    client = VLLMClient(address.with_key, field="rollout_server", timeout=0.2, gone=address.gone)
    assert client.urls == ["http://127.0.0.1:1"]
    with pytest.raises(ServerError) as failure:
        client.get("/v1/models", client.urls[0], 0.2)
    assert "secret" not in str(failure.value)
