"""A second model over weights that are there already.

One copy of a base model can hold several roles, because a model is two things: its weights and the modules that use
them. `second_model` makes the modules anew over the very same parameters, without the adapters of the first. So a
teacher that shares the student's base has its own train mode, dropout, hooks and adapter, and nothing that it does can
reach the student's; what they have in common does not change while the student trains an adapter.

A student can teach itself in the same way: `same_model` has all of its parameters, what it trains included, and
`with_own_adapter` has its own of those that are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gkd.models.zero import gathered

# Initialisations that take something out of the base's weights when the adapter is made.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def _check_initialisation(config: Any, what: str) -> None:
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{what} has init_lora_weights={start!r}, which takes something out of the base's weights, so they are no "
            "longer the teacher's: use another initialisation, or give the teacher weights of its own "
            "(without share_base_model or self_teacher)"
        )


# ------------------------------------------------------------------------------------------------- shared weights


def check_shareable(student: nn.Module, asked: str = "share_base_model=True") -> None:
    """Refuse a student whose training changes the weights that its teacher would share.

    `asked` is the field that shares them, for the messages.

    Raises:
        ValueError: it has no adapter, or the adapter's training or making changes the base.
    """
    if not isinstance(student, PeftModel):
        raise ValueError(
            f"{asked} needs a student with an adapter: full fine-tuning changes the weights that the teacher shares. "
            f"Pass a peft_config (--use_peft), or leave {asked.partition('=')[0]} out and name the teacher"
        )
    for name, config in student.peft_config.items():
        _check_initialisation(config, f"{asked}: the student's adapter {name!r}")
    if _is_merged(student):
        raise ValueError(f"{asked}: the student's adapter is merged into the base: call unmerge_adapter()")


def _is_merged(student: nn.Module) -> bool:
    return any(layer.merged for layer in student.modules() if isinstance(layer, BaseTunerLayer))


def second_model(model: Any) -> Any:
    """Another model over the same parameters, without the adapters of the first; in eval mode, its buffers its own.

    Raises:
        ValueError: a `device_map` has spread the parameters over several devices.
    """
    twin = _twin(model.get_base_model() if hasattr(model, "get_base_model") else model)
    _drop_adapters(twin)
    vars(twin).pop("peft_config", None)
    return twin


def same_model(student: nn.Module) -> Any:
    """A second model over all parameters of the first: what the one learns, the other knows at once.

    Raises:
        ValueError: see `second_model`.
    """
    return _twin(student)


def with_own_adapter(student: nn.Module) -> Any:
    """A second model over the frozen parameters of the first, with its own of those that are trained, equal to the
    first's at present; whole, where ZeRO-3 has split these up. A collective there.

    Raises:
        ValueError: the student has no adapter, or one that is merged; see `second_model`, too.
    """
    if not isinstance(student, PeftModel):
        raise ValueError(
            "self_teacher='ema' needs a student with an adapter: of full fine-tuning the average would be a second "
            "copy of the model. Pass a peft_config (--use_peft), or use self_teacher='live'"
        )
    if _is_merged(student):
        raise ValueError("self_teacher='ema': the student's adapter is merged into the base: call unmerge_adapter()")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with gathered(trained):
        return _twin(student, {id(parameter) for parameter in trained})


def _twin(model: Any, own: Collection[int] = ()) -> Any:
    """The modules anew over the same parameters, in eval mode, with their own buffers and copies of the parameters
    whose ids are in `own`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    devices = set((getattr(base, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"device_map has spread the weights over {len(devices)} devices, and weights that several models share "
            "(share_base_model, self_teacher, teacher_adapters, an adapter on a teacher_model) must stand on one: "
            "leave it out"
        )
    same: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own}
    for module in model.modules():
        same |= {id(thing): thing for thing in _packed(module)}
    twin = copy.deepcopy(model, same)
    for module in twin.modules():
        vars(module).pop("forward", None)  # a replacement that may be bound to the first model
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return twin.eval()


def _packed(module: Any) -> list[Any]:
    """What a layer of bitsandbytes holds of its weight outside the parameter: scales, and int8 values after a run."""
    scales, state = getattr(module, "quant_state", None), getattr(module, "state", None)
    held = vars(state).values() if hasattr(state, "__dict__") else ()
    return ([] if scales is None else [scales]) + [thing for thing in held if isinstance(thing, Tensor)]


def base_of_student(student: nn.Module, asked: str = "share_base_model=True") -> Any:
    """A second model over the base's weights of a student that trains an adapter.

    `asked` is the field that shares them, for the messages.

    Raises:
        ValueError: the student's training changes them.
    """
    check_shareable(student, asked)
    twin = second_model(student)
    trained = [name for name, parameter in twin.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{asked}, but the student trains {len(trained)} parameters of the base itself, "
            f"{trained[0]} for one: use an adapter with bias='none'"
        )
    return twin


def is_new(student: nn.Module) -> bool:
    """Whether a LoRA adapter still does nothing: B is 0 as it was made."""
    ups = [
        parameter for name, parameter in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name
    ]
    return bool(ups) and not any(bool(parameter.any()) for parameter in ups)


def _drop_adapters(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        inner = child
        while True:
            if isinstance(inner, AuxiliaryTrainingWrapper):  # modules_to_save, trainable_token_indices
                inner = inner.original_module
            elif isinstance(inner, BaseTunerLayer):
                inner = inner.get_base_layer()
            else:
                break
        if inner is not child:
            setattr(module, name, inner)
        _drop_adapters(inner)
