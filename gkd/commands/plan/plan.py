"""`gkd plan`: will it fit? The memory of a recipe's run on each GPU, from the configs alone; no weights are loaded."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gkd.assembly.own_servers import memory_share
from gkd.commands.plan.changes import smallest_change
from gkd.commands.plan.memory import (
    GIB,
    MEASURED_ERROR,
    Estimate,
    ModelShape,
    Setup,
    estimate,
    host_memory,
    kv_cache,
)
from gkd.config.several import of_entry
from gkd.models.facts import key_width
from gkd.models.loading import adapter_config, load_config
from gkd.models.quantized import with_quantization
from gkd.recipe.capture import Recipe
from gkd.recipe.objective import leave_teacher_out
from gkd.recipe.settings import Settings
from gkd.rollouts.batch_size import rollout_rows

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = {"": 1, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12}


def parse_memory(text: str) -> int:
    """ "80GB" -> bytes (GB = 10^9, GiB = 2^30).

    Raises:
        ValueError: no number with one of the units.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(f"gpu_memory={text!r} is no amount of memory: write for example 80GB or 24GiB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def shape_of(config: Any) -> ModelShape:
    """Count a model that is never built: its parameters stand on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = getattr(text, "num_experts_per_tok", 1) or 1
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),  # a tied head is one tensor, counted once
        linear=sum(module.weight.numel() for module in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=intermediate * experts,
        query=heads * width,
        key=key_width(config),
        vocab=text.vocab_size,
        lora_widths=sum(module.in_features + module.out_features for module in linear),
        lora_inputs=sum(module.in_features for module in linear),
    )


def setup_of(recipe: Recipe, gpus: int, zero_stage: int, offload: bool, memory: int | None = None) -> Setup:
    """The run that a recipe with its flags asks for, on GPUs with `memory` bytes each.

    Raises:
        ValueError: a model that is not named, or whose config cannot be read.
    """
    settings, args = recipe.settings, recipe.settings.training
    setups, lent = [], False
    for name, one in args.each_teacher.items():
        with of_entry(name):
            setup = _setup_of_one(replace(recipe, settings=replace(settings, training=one)), gpus, zero_stage, offload)
        # Several on one base: its weights count once.
        stands_on_it = name in args.teachers_on_base and len(args.teachers_on_base) > 1
        setups.append(replace(setup, shares_base=True) if lent and stands_on_it else setup)
        lent = lent or stands_on_it
    setup = replace(setups[0], others=tuple(setups[1:]))
    if args.rollout_server_sharing is not None and setup.device == "cuda":
        setup = replace(setup, server=int(memory_share(args) * (memory or 0)))
    if args.rollout_batch_size is not None:
        return setup
    window = setup.batch * args.gradient_accumulation_steps * args.rollout_every
    rows = rollout_rows(setup.batch, window, kv_cache(setup), (memory or 0) if setup.device == "cuda" else None)
    return replace(setup, rollout_batch=rows)


def _setup_of_one(recipe: Recipe, gpus: int, zero_stage: int, offload: bool) -> Setup:
    """The same with one teacher, and the rows of a rollout left open."""
    settings, args = recipe.settings, copy.copy(recipe.settings.training)
    leave_teacher_out(args, settings.run.evaluate_before_and_after)
    if gpus < 1 or zero_stage not in range(4):
        raise ValueError(f"gpus={gpus} and zero_stage={zero_stage}: use at least one GPU and a stage from 0 to 3")
    student = shape_of(_config(settings.model.model_name_or_path, "model_name_or_path", args.trust_remote_code))
    # A teacher on a server counts for its vocabulary only, which is the student's; one may be the student's base.
    nobody = args.teacher_model_name_or_path is None and not args.needs_teacher
    elsewhere = args.teacher_is_elsewhere or args.shares_weights or nobody
    nameless = args.teacher_model_name_or_path is None and elsewhere
    teacher_name = settings.model.model_name_or_path if nameless else args.teacher_model_name_or_path
    teacher_config = _config(teacher_name, "teacher_model_name_or_path", args.trust_remote_code)
    cuda = not args.use_cpu
    own = args.teacher_model_init_kwargs or {}
    weight_bytes = _BYTES.get(str(settings.model.dtype), 2)
    writes = {"student": args.student_writes, "teacher": args.teacher_writes}
    tokens = args.max_length or (args.prompt_limit or 1024) + args.most_new_tokens
    return Setup(
        student=student,
        teacher=shape_of(teacher_config),
        gpus=gpus,
        device="cuda" if cuda else "cpu",
        weight_bytes=weight_bytes,
        teacher_bytes=_teacher_bytes(own, teacher_config, str(settings.model.dtype)),
        activation_bytes=2 if args.bf16 or args.fp16 or weight_bytes == 2 else 4,
        lora_r=_rank(settings),
        lora_dropout=settings.model.lora_dropout > 0,
        fold=args.fold_adapter,
        batch=args.per_device_train_batch_size,
        tokens=tokens,
        targets=args.per_device_train_batch_size * (tokens if args.reads_answers else args.most_new_tokens),
        accumulates=args.gradient_accumulation_steps > 1,
        rollout_batch=args.rollout_batch_size or 1,
        generates=tuple(who for who in writes if writes[who]) if args.rollout_backend == "hf" else (),
        checkpointing=args.gradient_checkpointing,
        zero_stage=zero_stage,
        offload=offload,
        teacher_follows=not (isinstance(own, dict) and "dtype" in own) and not args.shares_weights,
        teacher_here=not (args.teacher_is_elsewhere or nobody),
        no_teacher=nobody,
        shares_base=args.shares_weights,
        averages=args.self_teacher == "ema",
        placement=args.teacher_placement,
        teacher_packed=_packed_bytes(own),
    )


def _teacher_bytes(init_kwargs: Any, config: Any, student_dtype: str) -> int:
    """Bytes of a weight of the teacher: in the dtype asked for, else in the student's, or its own beside float32."""
    dtype = str(init_kwargs.get("dtype", "auto") if isinstance(init_kwargs, dict) else "auto")
    if dtype == "auto":
        saved = getattr(config, "dtype", None) or "float32"
        dtype = str(saved) if student_dtype == "float32" else student_dtype
    return _BYTES.get(dtype.removeprefix("torch."), 2)


def _rank(settings: Settings) -> int | None:
    """The rank of the student's adapter: of the one that it goes on with, or of a new one."""
    name = settings.model.model_name_or_path
    adapter = None if name is None else adapter_config(name, settings.model.model_revision)
    if adapter is not None:
        return int(adapter.get("r") or settings.model.lora_r)
    return settings.model.lora_r if settings.model.use_peft else None


def _packed_bytes(init_kwargs: Any) -> float | None:
    """Bytes of a quantized weight: one, or half of one and 4 for each 64; None when nothing is quantized."""
    asked = with_quantization(dict(init_kwargs), torch.float32, "teacher_model_init_kwargs")
    config = asked.get("quantization_config")
    if not isinstance(config, BitsAndBytesConfig):
        return None
    return 0.5 + 4 / 64 if config.load_in_4bit else 1.0


def _config(name: str | None, field: str, trust_remote_code: bool) -> Any:
    if name is None:
        raise ValueError(f"{field} is missing: pass --{field}")
    return load_config(name, field=field, trust_remote_code=trust_remote_code)


def plan(
    recipe: Recipe, *, gpus: int, gpu_memory: str, zero_stage: int = 0, offload: bool = False, as_json: bool = False
) -> int:
    """Print the plan; returns 0 when the run fits, 1 when it does not."""
    budget = parse_memory(gpu_memory)
    setup = setup_of(recipe, gpus, zero_stage, offload, budget)
    found = estimate(setup)
    fits = found.peak <= budget
    remedy = [] if fits else smallest_change(setup, budget)
    if as_json:
        record = {
            "parts": found.parts,
            "rollout": found.rollout,
            "training": found.training,
            "peak": found.peak,
            "host": host_memory(setup),
        }
        record |= {"budget": budget, "fits": fits, "remedy": remedy}
        print(json.dumps({**record, "measured_error": MEASURED_ERROR.get(setup.device)}, indent=2))
    else:
        _show(setup, found, budget, remedy)
    return 0 if fits else 1


def _show(setup: Setup, found: Estimate, budget: int, remedy: list[str]) -> None:
    console = Console()
    table = Table(title=f"Memory on each of {setup.gpus} GPU(s), ZeRO stage {setup.zero_stage}", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in found.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    for name, size in (("peak of the rollout", found.rollout), ("peak of the training", found.training)):
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    sizes = [f"{one.teacher.parameters / 1e9:.2f}B teacher" for one in (setup, *setup.others) if not one.no_teacher]
    teachers = ", ".join(sizes or ["no teacher"])
    console.print(
        f"{setup.student.parameters / 1e9:.2f}B student, {setup.trained / 1e6:.1f}M trained; "
        f"{teachers}; {setup.batch} rows of up to {setup.tokens} tokens"
    )
    host = host_memory(setup) / GIB
    if host:
        console.print(f"CPU memory for what stands there: {host:.1f} GiB, with all {setup.gpus} GPU(s) on one machine")
    low, high = MEASURED_ERROR["cpu"]
    where = "" if setup.device in MEASURED_ERROR else "; on a GPU they have not been measured"
    console.print(
        f"These figures were {low:+.0%} to {high:+.0%} off the measured peaks of real runs on a CPU{where} "
        "(docs/scaling.md)"
    )
    if found.peak <= budget:
        console.print(f"fits: {found.peak / GIB:.1f} of {budget / GIB:.1f} GiB")
    else:
        console.print(f"does not fit: {found.peak / GIB:.1f} of {budget / GIB:.1f} GiB")
        console.print("the smallest change that makes it fit: " + ("; ".join(remedy) or "none that gkd knows of"))
