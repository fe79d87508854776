"""`gkd serve`: the flags are those that a run would start its server with, and the server answers."""

import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import save_tiny

from gkd.cli import main
from gkd.servers.own import free_port

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "stand_in"
RECIPE = """
from gkd.run import run
run(defaults={{"model_name_or_path": {student!r}, "teacher_model_name_or_path": {teacher!r}, "use_peft": True,
              "lora_r": 6, "max_prompt_length": 40, "max_new_tokens": 24, "max_length": 100, "lmbda": 0.5}})
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    student, teacher = (save_tiny(folder / name, "qwen2") for name in ("student", "teacher"))
    file = folder / "mine.py"
    file.write_text(RECIPE.format(student=str(student), teacher=str(teacher)))
    return file


def shown(capsys, *flags):
    assert main(["serve", *map(str, flags), "--print"]) == 0
    return shlex.split(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_students_server(recipe, capsys):
    words = shown(capsys, recipe, "--port", 8123, "--vllm_args", "--max-num-seqs 8")
    line = " ".join(words)
    assert words[words.index("serve") + 1].endswith("student")
    for part in ("--port 8123", "--enable-lora --max-lora-rank 8", "--max-model-len 64", "--max-num-seqs 8"):
        assert part in line
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
    assert "VLLM_SERVER_DEV_MODE=1" in shown(capsys, recipe, "--use_peft", "false")


def test_the_teachers_server(recipe, capsys):
    words = shown(capsys, recipe, "--teacher")
    line = " ".join(words)
    assert words[words.index("serve") + 1].endswith("teacher")
    assert "--max-logprobs 32 --enable-scale-out" in line
    assert "--max-model-len 101" in line
    assert "lora" not in line.lower()


def test_it_answers_where_it_was_told_to(recipe):
    port = free_port()
    words = [sys.executable, "-m", "gkd.cli", "serve", str(recipe), "--port", str(port)]
    path = os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.3)
    finally:
        server.terminate()
        server.wait(30)


def test_without_vllm_it_says_where_to_get_it(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["serve", str(recipe)])
    assert exit_.value.code == 2
    assert "has no vLLM: make an environment for it" in capsys.readouterr().err
