"""Where a frozen model's weights stand: whole on every rank's accelerator, in CPU memory while it does nothing, or
split over the ranks by DeepSpeed ZeRO-3 (Rajbhandari et al., arXiv 1910.02054), whatever the student's stage.

A ZeRO-3 engine without an optimizer holds one rank's share of the weights and gathers a layer's while it runs; with
`zero3_offload` that share stands in CPU memory. The student's own engine, DDP included, knows nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations import deepspeed as zero_loading

from gkd.models.head import output_layer
from gkd.models.quantized import keep_layout
from gkd.models.zero import is_sharded, zero_stage

SHARDED = ("zero3", "zero3_offload")


# ------------------------------------------------------------------------------------------------------- refusals


def check_placement(placement: str, num_processes: int, student_is_sharded: bool) -> None:
    """Refuse what the launch cannot honour, before anything is loaded.

    Args:
        placement: `teacher_placement`. num_processes: of the launch. student_is_sharded: it runs under ZeRO-3.

    Raises:
        ValueError: naming the value and the remedy.
    """
    if placement == "cpu_offload" and student_is_sharded:
        raise ValueError(
            "teacher_placement='cpu_offload' does not go with ZeRO-3, which splits every model up while it is loaded: "
            "use teacher_placement='zero3_offload', or leave it out"
        )
    if placement not in SHARDED:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"teacher_placement={placement!r} needs DeepSpeed: pip install deepspeed")
    if num_processes < 2:
        raise ValueError(
            f"teacher_placement={placement!r} has one process to split the teacher over: start several (accelerate "
            "launch --num_processes 2), or use teacher_placement='cpu_offload' or a quantized teacher"
        )


def check_placeable(model: Any, placement: str) -> None:
    """Refuse a model that cannot be moved or split up.

    Raises:
        ValueError: it is quantized, or its `device_map` has placed it already.
    """
    if placement == "same":
        return
    if getattr(model, "is_quantized", False):
        why = "packed weights cannot be split up" if placement in SHARDED else "its scales would stay behind"
        raise ValueError(
            f"teacher_placement={placement!r} does not go with a quantized teacher ({why}): leave teacher_placement "
            "out, or load the teacher in bfloat16"
        )
    if getattr(model, "hf_device_map", None) is not None:
        raise ValueError(
            f"teacher_placement={placement!r} does not go with a device_map, which has placed the teacher already: "
            "take device_map out of teacher_model_init_kwargs, or leave teacher_placement out"
        )


def check_loading(kwargs: dict[str, Any], placement: str, quantized: bool = False) -> None:
    """The same from the keyword arguments of `from_pretrained`, before minutes of loading.

    Args:
        kwargs: those arguments. placement: `teacher_placement`.
        quantized: whether the model is saved so.

    Raises:
        ValueError: see `check_placeable`; or it is quantized and would be split up as the student is.
    """
    quantized = quantized or kwargs.get("quantization_config") is not None
    if quantized and zero_loading.is_deepspeed_zero3_enabled():
        raise ValueError(
            "the teacher is quantized, which ZeRO-3 cannot split up: load it in bfloat16, or use DDP or ZeRO-2"
        )
    check_placeable(SimpleNamespace(is_quantized=quantized, hf_device_map=kwargs.get("device_map")), placement)


# ------------------------------------------------------------------------------------------------------ placing


def place_teacher(
    model: nn.Module, accelerator: Accelerator, placement: str = "same", *, alone: bool = True
) -> nn.Module:
    """Freeze a model and put it where `teacher_placement` says; the result is what scores and generates.

    `same`: as the student is placed (whole, or split up under ZeRO-3). Sharded placements: all ranks call this.
    `cpu_offload`: unless it is the only teacher, its head goes when its turn is over, too.

    Raises:
        ValueError: see `check_placement` and `check_placeable`.
    """
    check_placement(placement, accelerator.num_processes, zero_stage(accelerator) == 3)
    check_placeable(model, placement)
    keep_layout(model)
    if placement in SHARDED:
        return _sharded(freeze(model), placement)
    if placement == "cpu_offload":
        offload(freeze(model), accelerator.device, head_stays=alone)
        return model
    return place_frozen(model, accelerator)


# ------------------------------------------------------------------------------------------------- CPU memory


class _Moved:
    """Tensors that stand in CPU memory, and on the accelerator inside `here`.

    The CPU memory keeps its copy meanwhile (frozen weights do not change), so there is one transfer each time and none
    back.
    """

    def __init__(self, tensors: Iterable[Tensor], move: Callable[[Tensor], Tensor], pin: bool) -> None:
        self._move = move
        self._depth = 0
        self._at_home: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            home = tensor.data.cpu()
            tensor.data = home.pin_memory() if pin else home
            self._at_home.append((tensor, tensor.data))

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """The tensors are on the accelerator inside, and off it again on leaving and when the body raises."""
        self._depth += 1
        try:
            if self._depth == 1:
                for tensor, home in self._at_home:
                    tensor.data = self._move(home)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for tensor, home in self._at_home:
                    tensor.data = home


class Offload:
    """A model's weights that stand in CPU memory while it does nothing.

    The loss projects with the output head after the model has run. Of one such model the head stays on the
    accelerator; where several take turns, it comes for the model and for the loss, and goes again.
    """

    def __init__(self, model: nn.Module, move: Callable[[Tensor], Tensor], pin: bool, head_stays: bool) -> None:
        head = {id(parameter) for parameter in output_layer(model).parameters()}
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        if head_stays:
            for key in head:
                tensors[key].data = move(tensors[key].data)
        comes = [] if head_stays else [tensor for key, tensor in tensors.items() if key in head]
        self.head = _Moved(comes, move, pin)
        self.body = _Moved((tensor for key, tensor in tensors.items() if key not in head), move, pin)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """The whole model is on the accelerator inside."""
        with self.head.here(), self.body.here():
            yield


_OFFLOADED: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()


def offload(
    model: nn.Module,
    device: torch.device,
    move: Callable[[Tensor], Tensor] | None = None,
    *,
    head_stays: bool = True,
) -> None:
    """Keep a frozen model in CPU memory; `on_accelerator` brings it to `device`.

    Args:
        model: a causal language model.
        device: the accelerator. On a CPU nothing moves.
        move: instead of the transfer to `device`.
        head_stays: its output head goes to `device` for good; else `head_on_accelerator` brings it.
    """
    pin = device.type == "cuda"  # pageable memory would be copied to pinned memory first, each time
    move = move or (lambda tensor: tensor.to(device, non_blocking=True))
    _OFFLOADED[model] = Offload(model, move, pin, head_stays)


@contextlib.contextmanager
def on_accelerator(model: nn.Module) -> Iterator[None]:
    """Inside, an `offload`ed model is on the accelerator; nothing happens to any other model."""
    state = _OFFLOADED.get(model)
    with contextlib.nullcontext() if state is None else state.here():
        yield


@contextlib.contextmanager
def head_on_accelerator(model: nn.Module) -> Iterator[None]:
    """Inside, the output head of an `offload`ed model is on the accelerator."""
    state = _OFFLOADED.get(model)
    with contextlib.nullcontext() if state is None else state.head.here():
        yield


# ------------------------------------------------------------------------------------------------------- ZeRO-3


def zero3_config(dtype: torch.dtype, hidden: int, placement: str) -> dict[str, Any]:
    """A DeepSpeed configuration that splits a frozen model up: ZeRO-3, no optimizer, no scheduler.

    Tensors of at most 10 x the hidden size (norms, biases) stay whole: gathering them costs more than they weigh.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
    }
    if placement == "zero3_offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    halves = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without a meaning where nothing is trained
        "zero_optimization": zero,
        **{name: {"enabled": dtype == half} for half, name in halves.items()},
    }


@contextlib.contextmanager
def split_while_loading(placement: str, dtype: torch.dtype, hidden: int) -> Iterator[None]:
    """Inside, `from_pretrained` gives each rank its share only, so the whole never stands anywhere."""
    if placement not in SHARDED:
        yield
        return
    _join_processes()
    before = zero_loading._hf_deepspeed_config_weak_ref
    config = zero_loading.HfDeepSpeedConfig(zero3_config(dtype, hidden, placement))
    try:
        yield
    finally:
        zero_loading._hf_deepspeed_config_weak_ref = before  # the student's, or none
        del config


def _sharded(model: Any, placement: str) -> nn.Module:
    import deepspeed

    _join_processes()
    config = zero3_config(model.dtype, int(model.config.get_text_config().hidden_size), placement)
    if not is_sharded(model):  # passed as a model: split up tensor by tensor, or the engine would first move all of it
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=model.dtype)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return freeze(engine)


def _join_processes() -> None:
    """Let DeepSpeed use the process group that accelerate has made."""
    import deepspeed

    assert torch.distributed.is_initialized(), "several processes without a process group"
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode and no gradients, for good."""
    model.eval()
    model.requires_grad_(False)
    return model


def place_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a frozen model where it can be scored with: sharded under ZeRO-3, whole on this rank's device otherwise.

    Under DDP and ZeRO-1/2 a frozen model needs no engine of its own: it has no gradients to reduce and no optimizer.
    """
    freeze(model)
    if zero_stage(accelerator) == 3:
        from trl.models.utils import prepare_deepspeed

        return freeze(prepare_deepspeed(model, accelerator))
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model = model.to(accelerator.device)
    return model


def place_student(model: nn.Module, accelerator: Accelerator) -> None:
    """Put the student where it will be trained. Under ZeRO-1 and ZeRO-2 nobody else does so before training starts,
    and an evaluation before it would run on the CPU."""
    keep_layout(model)
    if zero_stage(accelerator) in (1, 2) and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)


def check_not_split(model: Any, role: str) -> None:
    """Refuse a model whose layers stand on several devices, or are split over ranks.

    Raises:
        ValueError: a `device_map` has spread it, or it was loaded for tensor parallelism.
    """
    if int(getattr(model, "tp_size", None) or getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(f"the {role} is split over ranks (tensor parallelism), which is not supported: load it whole")
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        kwargs = "model_init_kwargs" if role == "student" else "teacher_model_init_kwargs"
        raise ValueError(
            f"device_map has spread the {role} over {', '.join(devices)}, and its last hidden states and its output "
            f"head must stand where its inputs are: leave device_map out (of {kwargs}), and start a process for each "
            "GPU (accelerate launch --num_processes N); what does not fit: ZeRO-3, or teacher_placement for a teacher"
        )
