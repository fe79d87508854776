"""The command line of `gkd`: its commands, their flags and their help. Light: nothing is loaded for them."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from gkd._version import __version__

WITHOUT_RECIPE = ("new", "recipes", "export", "chat", "shrink")
EXAMPLE = "example:\n  gkd run gkd_glass"


def _wide(prog: str) -> argparse.HelpFormatter:
    """Flag and help on one line."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)


def make_parser() -> argparse.ArgumentParser:
    """Of the command line, with every command."""
    parser = argparse.ArgumentParser(
        prog="gkd",
        epilog=EXAMPLE,
        formatter_class=_wide,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gkd {__version__}")
    title = "on-policy knowledge distillation of language models"
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND [FLAGS]", title=title)
    for add in (
        _add_run,
        _add_new,
        _add_doctor,
        _add_evaluate,
        _add_precompute,
        _add_plan,
        _add_serve,
        _add_sweep,
        _add_recipes,
        _add_export,
        _add_chat,
        _add_shrink,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, *, summary: str, description: str, example: str, json_too: bool = False
) -> argparse.ArgumentParser:
    """A command; one that takes a recipe hands flags that are not its own to it."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"example:\n  {example}",
        formatter_class=_wide,
        allow_abbrev=False,
    )
    if name not in WITHOUT_RECIPE:
        command.add_argument("recipe", type=Path, help="its file, or the name of a built-in one")
    if json_too:
        command.add_argument("--json", action="store_true", help="print JSON instead")
    return command


def _add_run(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        summary="run a recipe in this process",
        description="Run a recipe file in this process; everything after it goes to the recipe (its --help lists it).",
        example="gkd run recipes/gkd_glass.py --max_steps 20",
    )
    run.add_argument("flags", nargs=argparse.REMAINDER, help="the recipe's flags")


def _add_precompute(commands: Any) -> None:
    precompute = _command(
        commands,
        "precompute",
        summary="let the teacher answer a recipe's prompts beforehand",
        description=(
            "Let the teacher answer a recipe's training prompts, once each, into the cache that training with "
            "--seq_kd reads (teacher_cache_dir); optionally as a data set of its own. Can be stopped and started "
            "again."
        ),
        example="gkd precompute recipes/gkd_glass.py --precompute_output answers",
    )
    precompute.add_argument("--precompute_output", metavar="DIR", help="also write the answers as a data set")
    precompute.add_argument("--precompute_push_to_hub", metavar="ID", help="push that data set to this repository")
    precompute.add_argument("--scores", action="store_true", help="score the rows into teacher_scores_dir instead")
    precompute.add_argument(
        "--student", action="store_true", help="let the student answer; with --scores, score that, too"
    )


def _add_doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        summary="check a recipe before it costs a GPU-day",
        description=(
            "Load what a recipe needs and print a checklist: tokens, templates, stop ids, rows (three of them in "
            "colour), perplexities, eight rollouts, memory, time of a step, versions. Further flags go to the "
            "recipe. Exit code 1 on an error."
        ),
        example="gkd doctor recipes/gkd_glass.py --max_new_tokens 20",
        json_too=True,
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        summary="measure a recipe's student and teacher, without training",
        description=(
            "Measure the student, an adapter of it, and the teacher on a recipe's held-out prompts. Further flags"
            " go to the recipe (--num_eval_prompts 256; --lm_eval_tasks hellaswag,arc_easy)."
        ),
        example="gkd evaluate recipes/gkd_glass.py --adapter outputs/gkd_glass",
        json_too=True,
    )
    evaluate.add_argument("--adapter", metavar="DIR", help="a trained adapter, beside the student as it is")


def _add_new(commands: Any) -> None:
    new = _command(
        commands,
        "new",
        summary="write a recipe for your data",
        description=(
            "Look at the data and write a recipe that runs. Columns that no known format has are named by "
            "--prompt_column (or --prompt_template) and --completion_column."
        ),
        example="gkd new mine --data rows.jsonl --student my/student --teacher my/teacher",
    )
    new.add_argument("name", metavar="NAME", help="the recipe's name")
    new.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="a file of rows, or a data set of the Hub",
    )
    new.add_argument("--student", metavar="MODEL", required=True, help="name or folder")
    new.add_argument("--teacher", metavar="MODEL", required=True, help="name or folder")
    new.add_argument("--output", metavar="FILE", help="recipes/NAME.py without it")
    new.add_argument("--prompt_column", metavar="COLUMN", help="with the question")
    new.add_argument("--completion_column", metavar="COLUMN", help="with the answer")
    new.add_argument("--prompt_template", metavar="TEXT", help="several columns: '{passage}\\n{question}'")
    new.add_argument("--force", action="store_true", help="overwrite the file")


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        summary="the memory that a recipe's run needs on each GPU",
        description=(
            "Print what a recipe's run needs on each GPU, part by part, from the models' configs alone, and the "
            "smallest change that makes it fit. Exit code 1 when it does not fit. Other flags go to the recipe."
        ),
        example="gkd plan recipes/gkd_qwen2.py --gpus 8 --gpu_memory 24GB --zero_stage 2",
        json_too=True,
    )
    plan.add_argument("--gpus", metavar="N", type=int, default=1, help="GPUs of the run (default 1)")
    plan.add_argument("--gpu_memory", metavar="SIZE", default="80GB", help="of each: 24GB, 80GB (the default)")
    plan.add_argument(
        "--zero_stage", metavar="STAGE", type=int, default=0, help="DeepSpeed ZeRO's; 0, DDP, by default"
    )
    plan.add_argument("--offload", action="store_true", help="optimizer (and ZeRO-3 weights) in CPU memory")


def _add_serve(commands: Any) -> None:
    serve = _command(
        commands,
        "serve",
        summary="start the vLLM server that a recipe's run needs",
        description=(
            "Print the flags of the vLLM server that a recipe's rollouts (or its teacher) need, and start it in "
            "this terminal. A run with rollout_server=auto does the same itself. Other flags go to the recipe."
        ),
        example="gkd serve gkd_qwen2 --port 8000 --vllm_python vllm-env/bin/python",
    )
    serve.add_argument("--teacher", action="store_true", help="the teacher's, which scores, not the student's")
    serve.add_argument("--vllm_python", metavar="FILE", help="Python of vLLM's environment (default: this one)")
    serve.add_argument("--vllm_args", metavar="FLAGS", help="further flags for vLLM, in one word")
    serve.add_argument("--port", metavar="N", type=int, default=8000, help="where it listens (default 8000)")
    serve.add_argument("--host", metavar="NAME", default="127.0.0.1", help="the interface (default: this machine)")
    serve.add_argument("--print", action="store_true", dest="shown_only", help="only print the command")


def _add_sweep(commands: Any) -> None:
    sweep = _command(
        commands,
        "sweep",
        summary="a grid of runs over several seeds, as a table with errors",
        description="Each cell of a grid with each seed; other flags go to the recipe. Can go on.",
        example='gkd sweep recipes/gkd_glass.py --grid "lmbda=0,0.5,1" --seeds 5',
    )
    sweep.add_argument("--grid", metavar="FIELD=A,B", action="append", default=[], help="a field; may come again")
    arm = "NAME: FIELD=A FIELD=B, fields that go together"
    sweep.add_argument("--arm", metavar="ARM", action="append", default=[], help=arm)
    sweep.add_argument("--seeds", metavar="N", type=int, default=3, help="seeds of each cell (default 3)")
    sweep.add_argument("--first_seed", metavar="N", type=int, help="instead of the recipe's own (42)")
    sweep.add_argument("--at", metavar="WHAT", default="steps", help="compare at equal steps, seconds, or both")
    sweep.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time (default 1)")
    sweep.add_argument("--tune", metavar="FIELD=A,B", action="append", default=[], help="choose it for each cell")
    sweep.add_argument("--launch", metavar="COMMAND", help='before the recipe: "accelerate launch"')
    sweep.add_argument("--output_dir", metavar="DIR", type=Path, help="outputs/RECIPE-sweep without it")


def _add_recipes(commands: Any) -> None:
    recipes = _command(
        commands,
        "recipes",
        summary="the recipes that come with the package",
        description=(
            "List the built-in recipes with a line each, or copy one into ./recipes (and a launch file into "
            "./deepspeed_configs) to change it. Every command takes a built-in recipe by its name."
        ),
        example="gkd recipes copy gkd_qwen2 --launch_file zero2",
    )
    recipes.add_argument("what", metavar="copy", nargs="?", choices=("copy",), help="put one here")
    recipes.add_argument("name", metavar="NAME", nargs="?", help="which")
    recipes.add_argument("--launch_file", metavar="NAME", help="with that file for accelerate launch")
    recipes.add_argument("--to", metavar="DIR", type=Path, default=Path(), help="instead of here")


def _add_export(commands: Any) -> None:
    export = _command(
        commands,
        "export",
        summary="a trained run as one model, for other programs",
        description=(
            "Add a run's adapter to its base model and save the whole with tokenizer, chat template, generation "
            "config and card, loaded again and compared. gguf: also converted by llama.cpp's script where there is "
            "one. ollama: with a Modelfile."
        ),
        example="gkd export outputs/mine --to merged",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="a run's output_dir, or a checkpoint in it")
    export.add_argument("--to", metavar="KIND", default="merged", help="merged (the default), gguf or ollama")
    export.add_argument("--output", metavar="DIR", type=Path, help="RUN-merged without it")
    export.add_argument("--dtype", metavar="NAME", default="auto", help="float32, bfloat16, float16; the base's")
    export.add_argument("--gguf_type", metavar="NAME", default="auto", help="f32, f16, bf16, q8_0")
    export.add_argument("--llama_cpp", metavar="DIR", type=Path, help="a clone of llama.cpp, if not on the PATH")
    export.add_argument("--trust_remote_code", action="store_true", help="let the model's own code run")


def _add_chat(commands: Any) -> None:
    chat = _command(
        commands,
        "chat",
        summary="ask student before, after and teacher, side by side",
        description=(
            "Student before the training, student after it and teacher answer in columns, in the run's chat template. "
            "Each goes on with its own chat; with --ask, every question is a chat of its own."
        ),
        example='gkd chat outputs/mine --ask "Why is the sky blue?"',
        json_too=True,
    )
    chat.usage = "gkd chat [options] RUN"
    chat.add_argument("run", metavar="RUN", type=Path, help="a run's output_dir, or a checkpoint in it")
    chat.add_argument("--ask", metavar="TEXT", action="append", default=[], help="ask this and end; may come again")
    chat.add_argument("--system", metavar="TEXT", help="the system turn")
    chat.add_argument("--models", metavar="A,B", help="some of before,after,teacher")
    chat.add_argument("--teacher", metavar="MODEL", help="another one than the run's")
    chat.add_argument("--max_new_tokens", metavar="N", type=int, default=256, help="of an answer (default 256)")
    chat.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0, the default, is greedy")
    chat.add_argument("--serve", action="store_true", help="print the commands that serve the run, and end")
    chat.add_argument("--trust_remote_code", action="store_true", help="let the models' own code run")


def _add_shrink(commands: Any) -> None:
    command = _command(
        commands,
        "shrink",
        summary="a student from a teacher, with fewer layers or neurons",
        description=(
            "Leave out the run of layers, and the inner neurons of every MLP, that change the hidden state least on "
            "your rows, and save the rest with tokenizer, chat template and generation config as a student."
        ),
        example="gkd shrink my/model --layers 24 --width 4096 --rows rows.jsonl",
    )
    command.add_argument("teacher", metavar="TEACHER", help="name or folder")
    command.add_argument("--layers", metavar="N", type=int, help="how many layers the student has")
    command.add_argument("--width", metavar="N", type=int, help="how many inner neurons each of its MLPs has")
    command.add_argument("--rows", metavar="ROWS", required=True, help="a file of rows, or a recipe with its own")
    command.add_argument("--output", metavar="DIR", type=Path, help="else outputs/TEACHER-N-layers-N-wide")
    command.add_argument("--single", action="store_true", help="single layers that change least, not one run")
    command.add_argument("--trust_remote_code", action="store_true", help="let the model's own code run")
