"""How much memory a run needs on each GPU, from the models' configs alone.

Letters: P parameters, A trained parameters, L layers, h hidden size, i MLP size, q and k widths of all query and of
all key heads, V vocabulary, B rows of a micro-batch, R rows of a rollout, T tokens of a row, w and a bytes of a weight
and of an activation, N GPUs. The formulas are in the functions; `docs/scaling.md` has them as a table, with what was
measured beside what they give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gkd.loss.chunks import default_chunk_size

GIB = 2**30
# A CUDA context with its libraries' workspaces; a process on a CPU with torch, transformers and trl imported.
OVERHEAD = {"cuda": int(1.0 * GIB), "cpu": int(0.7 * GIB)}
# Smallest and largest error of the peak against measured ones, (planned / measured) - 1, by device:
# benchmarks/results/memory_<device>_smollm2.json.
MEASURED_ERROR = {"cpu": (0.03, 0.09)}


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need to know of a model.

    Attributes:
        parameters: P. linear: those in the linear layers of its blocks. layers: L. hidden: h. intermediate: i (of the
            active experts). query, key: q, k. vocab: V. lora_widths: sum of in + out over the linear layers.
        lora_inputs: sum of in over them.
    """

    parameters: int
    linear: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocab: int
    lora_widths: int
    lora_inputs: int


@dataclass(frozen=True)
class Setup:
    """A run: models, numbers of bytes, sizes of batches, and what is split over how many GPUs.

    Attributes:
        weight_bytes, teacher_bytes: of one weight as loaded. activation_bytes: 2 under bf16 or fp16, else 4.
        lora_r: rank, or None for full fine-tuning. lora_dropout: whether the adapter has any. fold: whether
            it is folded into a copy of the weights for a rollout.
        batch: B. tokens: T of the longest row. targets: most target tokens of a micro-batch. rollout_batch: R.
        accumulates: whether gradients add up over several micro-batches.
        generates: which of "student", "teacher" write completions in this process.
        zero_stage: 0 to 3. offload: optimizer states (and ZeRO-3 weights) in CPU memory.
        teacher_follows: the teacher is loaded in the student's dtype when that is not float32.
        teacher_here: False when it is scored on a server. no_teacher: there is none.
        shares_base: the teacher's weights are the student's. averages: but for a moving average of the adapter.
        others: the same with each further teacher, of several; only what is said of a teacher counts there.
        server: bytes of a vLLM server on the same GPU while it is awake; None where there is none.
        placement: `teacher_placement`. teacher_packed: bytes of a quantized weight in its linear layers, or None.
    """

    student: ModelShape
    teacher: ModelShape
    gpus: int = 1
    device: str = "cuda"
    weight_bytes: int = 4
    teacher_bytes: int = 2
    activation_bytes: int = 2
    lora_r: int | None = 16
    lora_dropout: bool = False
    fold: bool = True
    batch: int = 4
    tokens: int = 1024
    targets: int = 512
    rollout_batch: int = 16
    accumulates: bool = True
    generates: tuple[str, ...] = ("student",)
    checkpointing: bool = True
    zero_stage: int = 0
    offload: bool = False
    teacher_follows: bool = False
    teacher_here: bool = True
    no_teacher: bool = False
    shares_base: bool = False
    averages: bool = False
    placement: str = "same"
    teacher_packed: float | None = None
    server: int | None = None
    others: tuple[Setup, ...] = ()

    @property
    def each(self) -> tuple[Setup, ...]:
        """A setup for each teacher: this run with that one alone."""
        own = ("teacher", "teacher_bytes", "teacher_here", "shares_base", "placement", "teacher_packed")
        return (self, *(replace(self, others=(), **{name: getattr(o, name) for name in own}) for o in self.others))

    @property
    def trained(self) -> int:
        """A: trained parameters."""
        return self.student.parameters if self.lora_r is None else self.lora_r * self.student.lora_widths


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU by part, and the peak: the larger of the rollout's and the training's moment."""

    parts: dict[str, int]
    rollout: int
    training: int

    @property
    def peak(self) -> int:
        return max(self.rollout, self.training)


def layer_activations(
    model: ModelShape, activation_bytes: int, trained: bool = True, lora_dropout: bool = False
) -> int:
    """Bytes per token and layer that the backward pass keeps (untrained: that live at once).

    Kept: both norms' inputs in fp32 and their outputs, queries, keys and values (repeated to the queries' width, as
    with a padding mask), the attention's output twice, and of the MLP gate, up, activation and product. A LoRA layer
    with dropout keeps an input of its own and a mask of one byte.
    """
    if not trained:
        return activation_bytes * (2 * model.hidden + model.query + 2 * model.key + 3 * model.intermediate)
    kept = 2 * model.hidden + 5 * model.query + 4 * model.intermediate
    dropped = (activation_bytes + 1) * model.lora_inputs // model.layers if lora_dropout else 0
    return activation_bytes * kept + 2 * 4 * model.hidden + dropped


def _one_layer(setup: Setup) -> int:
    dropout = setup.lora_dropout and setup.lora_r is not None
    layer = layer_activations(setup.student, setup.activation_bytes, lora_dropout=dropout)
    return setup.batch * setup.tokens * layer


def kept_activations(setup: Setup) -> int:
    """Of the student, from its forward pass to the loss: every layer's, or with checkpointing every layer's input."""
    layers, row = setup.student.layers, setup.student.hidden * setup.activation_bytes
    return layers * (setup.batch * setup.tokens * row if setup.checkpointing else _one_layer(setup))


def activations(setup: Setup) -> int:
    """Of the student's backward pass: with checkpointing, one layer's come on top of all inputs."""
    return kept_activations(setup) + (_one_layer(setup) if setup.checkpointing else 0)


def loss_buffers(setup: Setup) -> int:
    """The fused divergence: chunk buffers that do not grow with the batch, and the targets' hidden states."""
    widest = max(one.teacher.hidden for one in setup.each)
    vocab = max(setup.student.vocab, *(one.teacher.vocab for one in setup.each))
    trained_head = setup.lora_r is None
    rows = min(default_chunk_size(vocab, 4, setup.device, trained_head), setup.targets)
    buffers = (6 if setup.device == "cuda" else 2.5) * rows * vocab * 4
    hidden = setup.targets * (setup.student.hidden * (setup.activation_bytes + 4) + widest * 4)
    head = vocab * setup.student.hidden * 4 if trained_head else 0
    return int(buffers + hidden + head)


def kv_cache(setup: Setup) -> int:
    """Keys and values of the longest rollout: 2 x L x k x a bytes for each of R x T tokens."""
    widest = 0
    for who in setup.generates:
        models = [setup.student] if who == "student" else [one.teacher for one in setup.each]
        widest = max(widest, *(2 * model.layers * model.key * setup.activation_bytes for model in models))
    return setup.rollout_batch * setup.tokens * widest


def folds(setup: Setup) -> bool:
    """Whether a rollout folds an adapter into a copy of the weights."""
    return setup.fold and setup.lora_r is not None and "student" in setup.generates


def teacher_weights(setup: Setup) -> tuple[int, int]:
    """Bytes of the teachers that stand on a GPU all the time, and those that come while one scores or writes: several
    take turns."""
    standing, coming = zip(*(_weights_of_one(one, alone=not setup.others) for one in setup.each), strict=True)
    return sum(standing), max(coming)


def _weights_of_one(setup: Setup, alone: bool) -> tuple[int, int]:
    """The same of one teacher. Its head stays there for the loss, unless others take turns with it.

    What is split up comes layer by layer, which is not counted, to score; to write, it is gathered whole.
    """
    if setup.averages:
        return 4 * setup.trained, 0  # in fp32, whole on every GPU
    if not setup.teacher_here or setup.shares_base:
        return 0, 0
    model = setup.teacher
    linear = model.linear * (setup.teacher_bytes if setup.teacher_packed is None else setup.teacher_packed)
    whole = int((model.parameters - model.linear) * setup.teacher_bytes + linear)
    if setup.placement == "cpu_offload":
        head = model.vocab * model.hidden * setup.teacher_bytes if alone else 0
        return head, whole - head
    if setup.placement == "zero3_offload":
        return 0, 0
    split = setup.placement == "zero3" or setup.zero_stage == 3
    return whole // (setup.gpus if split else 1), 0


def host_memory(setup: Setup) -> int:
    """Bytes of weights and optimizer states in the CPU memory of a machine with all the GPUs.

    `cpu_offload` keeps a pinned copy of the teacher for each process; DeepSpeed's offloading splits its share up.
    """
    teacher = 0
    for one in setup.each:
        if one.teacher_here and not one.shares_base:
            if one.placement == "cpu_offload":
                teacher += setup.gpus * _weights_of_one(one, alone=not setup.others)[1]
            elif one.placement == "zero3_offload":
                teacher += one.teacher.parameters * one.teacher_bytes
    if not setup.offload or not setup.zero_stage:
        return teacher
    states = setup.trained * (8 + (4 if setup.weight_bytes < 4 else 0))
    weights = setup.student.parameters * setup.weight_bytes if setup.zero_stage == 3 else 0
    return teacher + states + weights


def _gathered(setup: Setup) -> int:
    """Models that are split up are gathered whole to write, one after the other."""
    sizes = [0]
    if setup.zero_stage == 3 and setup.generates:
        sizes.append(setup.student.parameters * setup.weight_bytes)
    for one in setup.each:
        if one.placement in ("zero3", "zero3_offload") and "teacher" in setup.generates:
            sizes.append(one.teacher.parameters * one.teacher_bytes)
    return max(sizes)


def estimate(setup: Setup) -> Estimate:
    """Bytes on each GPU.

    Stage 1 splits the optimizer states over the GPUs, stage 2 the gradients too, stage 3 the weights of student and
    teacher too. A rollout needs the whole student: under stage 3 it is gathered once per optimizer step, and a LoRA
    adapter is folded into a copy of the linear layers' weights, in the dtype of the products.
    """
    split = [setup.gpus if setup.zero_stage >= stage else 1 for stage in range(4)]
    trained, student = setup.trained, setup.student
    lora = setup.lora_r is not None
    state_bytes = 8 + (4 if setup.zero_stage and setup.weight_bytes < 4 else 0)  # Adam's moments, fp32 master weights
    offloaded = setup.offload and setup.zero_stage >= 1
    standing_teacher, coming_teacher = teacher_weights(setup)
    weights = student.parameters * setup.weight_bytes + (trained * 4 if lora else 0)
    parts = {
        "student weights": 0 if offloaded and setup.zero_stage == 3 else weights // split[3],
        "gradients": trained * 4 // split[2],
        "gradient buckets": trained * 4 if setup.gpus > 1 and not setup.zero_stage else 0,  # of DDP
        "optimizer": 0 if offloaded else trained * state_bytes // split[1],
        "teacher weights": standing_teacher,
        "teacher, while it works": coming_teacher,
        "student activations": activations(setup),
        "teacher activations": max(
            setup.batch * setup.tokens * layer_activations(one.teacher, setup.activation_bytes, False)
            if one.teacher_here
            else 0
            for one in setup.each
        ),
        "loss": loss_buffers(setup),
        "KV cache": kv_cache(setup),
        "gathered for the rollout": _gathered(setup),
        "folded adapter": student.linear * min(setup.weight_bytes, setup.activation_bytes) if folds(setup) else 0,
        "overhead": OVERHEAD[setup.device],
    }
    if setup.server is not None:
        parts |= {"vLLM server, asleep": OVERHEAD[setup.device], "vLLM server, awake": setup.server}
    standing = ["student weights", "gradient buckets", "optimizer", "teacher weights", "overhead"]
    # One after the other: the teacher's forward pass, the loss on top of the student's, the student's backward pass.
    scoring = parts["teacher activations"] + coming_teacher
    if setup.shares_base and setup.zero_stage == 3:  # it runs outside the engine: all of the student is gathered
        scoring += student.parameters * setup.weight_bytes
    moment = max(scoring, kept_activations(setup) + parts["loss"], parts["student activations"])
    gradients = parts["gradients"]
    if setup.zero_stage:  # DeepSpeed keeps them from step to step
        standing.append("gradients")
    elif setup.accumulates:
        moment += gradients
    else:  # they come while the activations go, and are gone before the next step
        moment = max(moment, gradients)
    base = sum(parts[name] for name in standing) + parts.get("vLLM server, asleep", 0)
    rollout = base + sum(parts[name] for name in ("KV cache", "gathered for the rollout", "folded adapter"))
    rollout += max(0, parts.get("vLLM server, awake", 0) - parts.get("vLLM server, asleep", 0))
    rollout += coming_teacher if "teacher" in setup.generates else 0
    training = base + moment
    return Estimate(parts, rollout, training)
