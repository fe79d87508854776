"""What to set so that a run fits into a GPU's memory: the smallest and least intrusive changes."""

from __future__ import annotations

from dataclasses import replace

from gkd.commands.plan.memory import Setup, estimate, folds


def changes(setup: Setup) -> list[tuple[str, Setup]]:
    """Single changes that save memory, the least intrusive first: (what to set, the changed setup)."""
    found: list[tuple[str, Setup]] = []
    if not setup.checkpointing:
        found.append(("--gradient_checkpointing", replace(setup, checkpointing=True)))
    rows = setup.rollout_batch
    while rows > 1:
        rows //= 2
        found.append((f"--rollout_batch_size {rows}", replace(setup, rollout_batch=rows)))
    batch = setup.batch
    while batch > 1:
        batch //= 2
        note = f"--per_device_train_batch_size {batch} (and gradient_accumulation_steps x {setup.batch // batch})"
        targets = max(1, setup.targets * batch // setup.batch)
        smaller = replace(setup, batch=batch, targets=targets, accumulates=True)
        found.append((note, smaller))
    if folds(setup):
        found.append(("--fold_adapter false", replace(setup, fold=False)))
    # Without fp32 weights beside them, an optimizer's small updates of 16-bit weights are rounded away.
    keeps_updates = setup.lora_r is not None or setup.zero_stage >= 1
    if setup.weight_bytes > 2 and keeps_updates:
        of_teacher = min(setup.teacher_bytes, 2) if setup.teacher_follows else setup.teacher_bytes
        found.append(
            ("--dtype bfloat16", replace(setup, weight_bytes=2, activation_bytes=2, teacher_bytes=of_teacher))
        )
    if setup.gpus > 1:
        for stage, name in ((2, "zero2"), (3, "zero3")):
            if setup.zero_stage < stage:
                found.append((f"deepspeed_configs/{name}.yaml", replace(setup, zero_stage=stage)))
    if setup.others:
        return [*found, *_changes_of_several(setup), *_last_changes(setup)]
    if setup.teacher_here and not setup.shares_base and setup.placement == "same" and setup.teacher_packed is None:
        if setup.zero_stage < 3:
            found.append(("--teacher_placement cpu_offload", replace(setup, placement="cpu_offload")))
        if setup.zero_stage < 3 and setup.gpus > 1:
            found.append(("--teacher_placement zero3", replace(setup, placement="zero3")))
    if setup.teacher_here:
        found.append(("--teacher_server_url: the teacher on a server of its own", replace(setup, teacher_here=False)))
    return [*found, *_last_changes(setup)]


def _changes_of_several(setup: Setup) -> list[tuple[str, Setup]]:
    """All of several teachers that stand on a GPU take turns."""
    movable = [
        o.teacher_here and not o.shares_base and o.placement == "same" and o.teacher_packed is None for o in setup.each
    ]
    if setup.zero_stage == 3 or not any(movable):
        return []
    moved = [replace(o, placement="cpu_offload") if m else o for o, m in zip(setup.each, movable, strict=True)]
    changed = replace(setup, placement=moved[0].placement, others=tuple(moved[1:]))
    return [("placement cpu_offload for each of the teachers", changed)]


def _last_changes(setup: Setup) -> list[tuple[str, Setup]]:
    """The most intrusive ones."""
    found: list[tuple[str, Setup]] = []
    if setup.lora_r is None:
        found.append(("--use_peft --lora_r 16", replace(setup, lora_r=16)))
    if setup.zero_stage >= 1 and not setup.offload:
        name = "zero3_offload" if setup.zero_stage == 3 else "zero2_offload"
        found.append((f"deepspeed_configs/{name}.yaml", replace(setup, offload=True)))
    return found


def smallest_change(setup: Setup, budget: int) -> list[str]:
    """What to set so that the peak fits into `budget` bytes: as few changes as are enough, the least intrusive first;
    empty when nothing helps.

    One, two or three are looked for in all combinations. Beyond that they come one after the other, each the one that
    saves most, and those that turn out not to be needed are left out again.
    """
    for number in (1, 2, 3):
        found = _fitting(setup, budget, number)
        if found is not None:
            return found
    steps: list[str] = []
    smaller = setup
    while estimate(smaller).peak > budget:
        options = [(estimate(changed).peak, text, changed) for text, changed in changes(smaller)]
        options = [option for option in options if option[0] < estimate(smaller).peak]
        if not options:
            return []
        _, text, smaller = min(options, key=lambda option: option[0])
        steps.append(text)
    for text in list(steps):
        rest = [step for step in steps if step != text]
        if _fits(setup, rest, budget):
            steps = rest
    return steps


def _fitting(setup: Setup, budget: int, number: int) -> list[str] | None:
    """So many changes, one after the other, after which the run fits."""
    for text, changed in changes(setup):
        if number == 1:
            if estimate(changed).peak <= budget:
                return [text]
        elif (rest := _fitting(changed, budget, number - 1)) is not None:
            return [text, *rest]
    return None


def _fits(setup: Setup, steps: list[str], budget: int) -> bool:
    """Whether the run fits after these changes; not when one of them is no longer there to be made."""
    for step in steps:
        changed = dict(changes(setup)).get(step)
        if changed is None:
            return False
        setup = changed
    return estimate(setup).peak <= budget
