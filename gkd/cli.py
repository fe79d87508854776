"""The console script `gkd`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gkd.commands.flags import WITHOUT_RECIPE, make_parser
from gkd.common.distribution import check_alone
from gkd.common.sign_of_life import SignOfLife
from gkd.recipe.capture import capture, run_recipe
from gkd.recipe.mistakes import mistakes_in_one_line

Action = Callable[[argparse.Namespace, list[str]], int]


def _run(arguments: argparse.Namespace, flags: list[str]) -> int:
    run_recipe(arguments.recipe, [*flags, *arguments.flags])
    return 0


def _plan(arguments: argparse.Namespace, flags: list[str]) -> int:
    with _stdout_for_json(arguments.json):
        from gkd.commands.plan.plan import plan

        recipe = capture(arguments.recipe, flags)
    return plan(
        recipe,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        zero_stage=arguments.zero_stage,
        offload=arguments.offload,
        as_json=arguments.json,
    )


def _serve(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.serve import order_of_recipe, serve

    started = ["--rollout_backend", "vllm", "--rollout_server", "auto"] if not arguments.teacher else []
    recipe = capture(arguments.recipe, [*started, *flags])
    order = order_of_recipe(recipe, teacher=arguments.teacher, port=arguments.port, host=arguments.host)
    extra = order.extra if arguments.vllm_args is None else arguments.vllm_args
    order = replace(order, python=arguments.vllm_python or order.python, extra=extra)
    return serve(order, shown_only=arguments.shown_only)


def _precompute(arguments: argparse.Namespace, flags: list[str]) -> int:
    output, push_to = arguments.precompute_output, arguments.precompute_push_to_hub
    if arguments.student:
        from gkd.commands.precompute.rollouts import precompute_rollouts, settings_on

        precompute_rollouts(capture(arguments.recipe, flags), output, push_to)
        if arguments.scores:
            from gkd.commands.precompute.scores import precompute_scores

            precompute_scores(capture(arguments.recipe, [*flags, *settings_on(output)]))
        return 0
    if arguments.scores:
        if output is not None or push_to is not None:
            raise ValueError("--scores does not go with --precompute_output: run one after the other")
        from gkd.commands.precompute.scores import precompute_scores

        precompute_scores(capture(arguments.recipe, flags))
        return 0
    from gkd.commands.precompute.answers import precompute

    precompute(capture(arguments.recipe, [*flags, "--seq_kd", "true"]), output, push_to)
    return 0


def _sweep(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.sweep.grid import parse_arms, parse_axes
    from gkd.commands.sweep.plan import Order
    from gkd.commands.sweep.sweep import sweep
    from gkd.recipe.shipped import recipe_file

    recipe = recipe_file(arguments.recipe)
    order = Order(
        recipe=recipe,
        flags=flags,
        axes=parse_axes(arguments.grid, "--grid"),
        tune=parse_axes(arguments.tune, "--tune"),
        seeds=arguments.seeds,
        at=tuple(dict.fromkeys(word.strip() for word in arguments.at.split(","))),
        jobs=arguments.jobs,
        launch=arguments.launch,
        folder=arguments.output_dir or Path("outputs", f"{recipe.stem}-sweep"),
        arms=parse_arms(arguments.arm),
        first_seed=arguments.first_seed,
    )
    return sweep(order, Console())


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """What libraries print goes to stderr, so that stdout holds the JSON and nothing else."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


@contextmanager
def _quietly() -> Iterator[None]:
    """Without log lines, warnings and progress bars: what is to be said stands in the checklist."""
    logging.disable(logging.WARNING)
    shown = (False, False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with SignOfLife("loading the libraries"):
                import datasets
                from transformers.utils import logging as of_transformers

            shown = not datasets.are_progress_bars_disabled(), of_transformers.is_progress_bar_enabled()
            datasets.disable_progress_bars()
            of_transformers.disable_progress_bar()
            yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            of_transformers.enable_progress_bar()
        logging.disable(logging.NOTSET)


def _doctor(arguments: argparse.Namespace, flags: list[str]) -> int:
    with _stdout_for_json(arguments.json), _quietly():
        from gkd.commands.doctor.examine import examine
        from gkd.commands.doctor.view import show_counts

        console = None if arguments.json else Console()
        diagnosis = examine(capture(arguments.recipe, flags), console)
    if console is None:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        show_counts(diagnosis, console)
    return 0 if diagnosis.passed else 1


def _evaluate(arguments: argparse.Namespace, flags: list[str]) -> int:
    with _stdout_for_json(arguments.json):
        from gkd.commands.evaluate import as_json, evaluate_recipe, results_table

        columns = evaluate_recipe(capture(arguments.recipe, flags), arguments.adapter)
    if int(os.environ.get("RANK", 0)) == 0:
        if arguments.json:
            print(json.dumps(as_json(columns), indent=2))
        else:
            Console().print(results_table(columns))
    return 0


def _recipes(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.recipes import copy_recipe, show_recipes

    if arguments.what is None:
        show_recipes(Console())
        return 0
    if arguments.name is None:
        raise ValueError("gkd recipes copy needs a name: `gkd recipes` lists them")
    files = copy_recipe(arguments.name, arguments.launch_file, arguments.to)
    print(f"wrote {' and '.join(map(str, files))}; next: gkd doctor {files[0]}")
    return 0


def _export(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.export.export import Order, export

    names = ("run", "to", "output", "dtype", "gguf_type", "llama_cpp", "trust_remote_code")
    with SignOfLife("exporting"):
        lines = export(Order(**{name: getattr(arguments, name) for name in names}))
    for line in lines:
        print(line)
    return 0


def _chat(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.chat.chat import Order, chat
    from gkd.commands.chat.serve import serving
    from gkd.commands.chat.speakers import NAMES, Manner

    order = Order(
        run=arguments.run,
        ask=tuple(arguments.ask),
        system=arguments.system,
        teacher=arguments.teacher,
        models=",".join(NAMES) if arguments.models is None else arguments.models,
        manner=Manner(arguments.max_new_tokens, arguments.temperature),
        as_json=arguments.json,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.serve:
        for line in serving(arguments.run):
            print(line)
        return 0
    with _stdout_for_json(arguments.json):
        found = chat(order, Console(), Console(stderr=True))
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def _shrink(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.shrink import Order, shrink

    names = ("teacher", "rows", "layers", "width", "output", "single", "trust_remote_code")
    with SignOfLife("shrinking"):
        lines = shrink(Order(**{name: getattr(arguments, name) for name in names}))
    for line in lines:
        print(line)
    return 0


def _new(arguments: argparse.Namespace, flags: list[str]) -> int:
    from gkd.commands.new import write_recipe

    columns = None
    if arguments.prompt_column is not None:
        columns = (arguments.prompt_column, arguments.completion_column)
        if arguments.prompt_template is not None:
            raise ValueError("--prompt_template does not go with --prompt_column: name the column in the template")
    elif arguments.completion_column is not None:
        if arguments.prompt_template is None:
            raise ValueError("--completion_column needs --prompt_column or --prompt_template beside it")
        columns = ("", arguments.completion_column)
    with SignOfLife("looking at the data"):
        path = write_recipe(
            arguments.name,
            arguments.data,
            arguments.student,
            arguments.teacher,
            output=arguments.output,
            columns=columns,
            force=arguments.force,
            template=arguments.prompt_template,
        )
    print(f"wrote {path}; next: gkd doctor {path}")
    return 0


_ACTIONS: dict[str, Action] = {
    "run": _run,
    "precompute": _precompute,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "new": _new,
    "plan": _plan,
    "serve": _serve,
    "sweep": _sweep,
    "recipes": _recipes,
    "export": _export,
    "chat": _chat,
    "shrink": _shrink,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done; 1 the doctor found an error, a plan does not fit, or a run of a
    sweep failed.

    Raises:
        SystemExit: 2 for a user's mistake, 1 for a training that had to give up, 130 for Ctrl-C.
    """
    parser = make_parser()
    arguments, flags = parser.parse_known_args(argv)
    if flags and arguments.command in WITHOUT_RECIPE:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    with mistakes_in_one_line():
        check_alone()
        code = _ACTIONS[arguments.command](arguments, flags)
    return code


if __name__ == "__main__":
    sys.exit(main())
