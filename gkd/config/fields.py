"""`GKDConfig`: TRL's `SFTConfig` plus the fields of generalized knowledge distillation, with their range checks.

Field names and defaults of `trl.experimental.gkd.GKDConfig` are kept; the others are ours. Options of `SFTConfig` that
this trainer cannot honour are refused rather than ignored.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl import SFTConfig

from gkd.common.redact import redact_settings, redact_value, without_secrets
from gkd.config.by_source import check_by_source, common_divergence, overrides
from gkd.config.collapse import check_collapse
from gkd.config.completions import COMPLETIONS_TO_PRINT, check_logging
from gkd.config.field_types import check_types
from gkd.config.rollouts import check_rollouts
from gkd.config.schedules import AUTO, check_schedules, read_schedules, schedule_of
from gkd.config.servers import LOGPROB_TOLERANCE, SERVER_TIMEOUT, check_servers
from gkd.config.settings import check_settings, loss_settings
from gkd.config.several import check_entries, check_several, config_of, entry_of, stands_on_base, weight_of
from gkd.config.teacher import SELF_TEACHER_DECAY, check_teacher
from gkd.config.training_values import check_accelerator_config, check_training_values
from gkd.config.values import check_counts, check_dicts, check_options, check_values
from gkd.config.weights import check_weights
from gkd.data.sources import SOURCES
from gkd.loss import DIVERGENCES, Divergence
from gkd.loss.token_weights import TOKEN_WEIGHTS


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class GKDConfig(SFTConfig):
    """Arguments of [`GKDTrainer`]. Every field is a command-line flag and a YAML key of a recipe.

    It joins no process group itself. `TrainingArguments` sets up its device while it is built, and under a launcher of
    several processes accelerate joins them then, for these arguments as for any of transformers'.

    Raises:
        ValueError: a value out of range, or an option that this trainer cannot honour; the message names the field,
            the value and the remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "teacher_adapters",
        "teachers",
        "generation_kwargs",
    ]

    # --- names and defaults of trl.experimental.gkd ---
    temperature: float | str = _field(
        0.9,
        "Sampling temperature of rollouts; 0 is greedy. Does not touch the loss. Or a schedule (docs/steering.md).",
    )
    lmbda: float | str = _field(
        0.5,
        "Share of the sequences whose completion the student writes, 0 to 1; or a schedule, or auto "
        "(docs/steering.md).",
    )
    beta: float | str = _field(
        0.5,
        "JSD interpolation: 0 = KL(teacher||student), 1 = KL(student||teacher). Only for divergence='jsd'. Or a "
        "schedule (docs/steering.md).",
    )
    max_new_tokens: int | str = _field(
        128, "Most tokens of a rollout, the stop token included; or a schedule (docs/steering.md)."
    )
    teacher_model_name_or_path: str | None = _field(None, "Teacher to load when no teacher_model is passed.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = _field(
        None, "Keyword arguments for loading the teacher by name, as a dict or JSON (dtype as string or torch.dtype)."
    )
    teacher_placement: str = _field(
        "same",
        "Where the teacher's weights stand: same (on every GPU), cpu_offload (there only while it works), zero3 "
        "(split over the GPUs), zero3_offload (and in CPU memory).",
    )
    teacher_adapter_name_or_path: str | None = _field(
        None, "A LoRA adapter on the teacher's model: a folder, or a name on the Hub; safetensors only."
    )
    share_base_model: bool = _field(
        False,
        "The teacher is the student's own base model, one copy of the weights: with teacher_adapter_name_or_path, or "
        "as it is (self-distillation). The student trains an adapter.",
    )
    teacher_adapters: dict[str, str | None] | str | None = _field(
        None,
        "Several teachers, an adapter each on the teacher's model, as a dict or JSON of names to adapters (null = "
        "none). The column `teacher` names each row's.",
    )
    self_teacher: str | None = _field(
        None,
        "The student teaches itself, from a prompt of the teacher's own: base (its base model, the adapter off), live "
        "(its present weights), ema (a moving average of its adapter). None = another teacher.",
    )
    self_teacher_decay: float = _field(
        SELF_TEACHER_DECAY,
        "Of self_teacher='ema', 0 to below 1: after each step, teacher = decay x teacher + (1 - decay) x student.",
    )
    teachers: dict[str, Any] | str | None = _field(
        None,
        "Several teachers of any kind, as a dict or JSON of names to {model | adapter | server, placement, "
        "quantization, top_k, template, weight, model_init_kwargs}. The column `teacher` names each row's.",
    )
    disable_dropout: bool = _field(
        True, "Turn dropout off in student and teacher. A LoRA adapter's own lora_dropout is left alone."
    )
    seq_kd: bool = _field(
        False, "Sequences that the student does not write are written by the teacher instead of taken from the data."
    )

    teacher_temperature: float | None = _field(
        None, "Sampling temperature of the teacher's sequences (seq_kd), 0 is greedy. None = temperature."
    )
    seq_kd_loss: str = _field(
        "divergence", "Loss on the teacher's sequences: divergence, or nll (their negative log-likelihood)."
    )
    teacher_cache_dir: str | None = _field(
        None,
        "Where the teacher's sequences are kept, so that it answers each prompt once. None = "
        "<output_dir>/_teacher_sequences; off = a new sample each time, as with a self_teacher that changes.",
    )
    teacher_scores_dir: str | None = _field(
        None,
        "Keep the teacher's last hidden states of sequences that come again here, and use them. None = score anew.",
    )

    # --- what the teacher reads ---
    teacher_template: str = _field(
        "student",
        "Whose chat template writes what the teacher reads: student, or own (of the teacher's tokenizer, for the same "
        "turns).",
    )
    teacher_end_of_turn: str | None = _field(
        None,
        "With teacher_template=own, the tokens that end a turn, as STUDENT=TEACHER. None = read off both templates.",
    )

    teacher_tokenizer_alignment: str | None = _field(
        None,
        "bytes: compare with a teacher of another tokenizer where the tokens of both stand for the same bytes. None = "
        "such a teacher is refused, or only writes.",
    )

    # --- the loss ---
    divergence: str = _field("jsd", f"Per-token divergence, one of: {', '.join(DIVERGENCES)}.")
    skew_lambda: float = _field(0.1, "Mixing share of the skew divergences (DistiLLM's alpha).")
    ab_alpha: float = _field(0.5, "Alpha of divergence='alpha_beta'.")
    ab_beta: float = _field(0.5, "Beta of divergence='alpha_beta'.")
    akl_mu: float = _field(0.5, "Mass of the teacher's head in divergence='adaptive_kl'.")
    symmetric_kl_weight: float = _field(
        0.5, "Share of the forward KL in divergence='symmetric_kl'; the reverse KL has the rest."
    )
    loss_temperature: float = _field(1.0, "Temperature of both softmaxes in the divergence.")
    teacher_loss_temperature: float | None = _field(None, "The teacher's, when it differs from loss_temperature.")
    scale_by_temperature_squared: bool = _field(
        False, "Multiply the divergence by loss_temperature^2 (Hinton et al.), in value and in gradient."
    )
    loss_reduction: str = _field(
        "token", "token: mean over all targets of the global batch. sequence: mean over each sequence, then over them."
    )
    ce_weight: float = _field(0.0, "w of loss = (1 - w) divergence + w cross-entropy on the given token.")
    ce_on_student_tokens: bool = _field(False, "Apply ce_weight to tokens that the student wrote, too.")
    teacher_top_k: int | None = _field(None, "Keep only the teacher's K most likely tokens. None = all.")
    top_k_tail: str = _field(
        "bucket",
        "bucket: K + 1 outcomes with the exact tail mass. renormalize: the teacher has no tail. renormalize_both: nor "
        "has the student. ignore: the tails are left out (forward KL only).",
    )

    # --- another loss for the sequences of one source ---
    divergence_data: str | None = _field(None, "divergence of the data's rows. None = divergence.")
    divergence_student: str | None = _field(None, "divergence of what the student has written. None = divergence.")
    divergence_teacher: str | None = _field(None, "divergence of what the teacher has written. None = divergence.")
    beta_data: float | None = _field(None, "beta of the data's rows. None = beta.")
    beta_student: float | None = _field(None, "beta of what the student has written. None = beta.")
    beta_teacher: float | None = _field(None, "beta of what the teacher has written. None = beta.")
    teacher_top_k_data: int | None = _field(None, "teacher_top_k of the data's rows. None = teacher_top_k.")
    teacher_top_k_student: int | None = _field(None, "teacher_top_k of what the student has written.")
    teacher_top_k_teacher: int | None = _field(None, "teacher_top_k of what the teacher has written.")

    # --- what a token, or a whole completion, counts ---
    skip_first_tokens: int = _field(0, "Do not train on the first so many tokens of each answer.")
    token_weights: str | None = _field(
        None, f"Weights of the tokens that the student has written, one of: {', '.join(TOKEN_WEIGHTS)}. None = alike."
    )
    reward_weight: float = _field(
        0.0, "alpha of loss = (1 - alpha) divergence - alpha E[reward] (GKD Eq. 5); the reward is the recipe's score."
    )
    reward_baseline: str = _field(
        "leave_one_out",
        "What a reward is compared with. leave_one_out: the mean of the step's other completions; running: the mean "
        "of earlier steps.",
    )
    log_top_k_overlap: int | None = _field(
        None, "Log how many of the K most likely tokens student and teacher share, on 64 targets of a micro-batch."
    )

    # --- completions that are left out ---
    mask_truncated_completions: bool = _field(False, "Do not train on rollouts that were cut off at max_new_tokens.")
    drop_repetitive_completions: bool = _field(False, "Do not train on repetitive rollouts (repetition_threshold).")
    repetition_threshold: float = _field(
        0.5, "A completion is repetitive when more than this share of its 4-grams occurred before in it."
    )
    max_nonfinite_steps: int = _field(
        3, "So many steps in a row without a finite loss and gradient (they are skipped) end training; 0 = never."
    )
    collapse_guard: str = _field(
        "off",
        "What happens when the student's rollouts collapse (docs/steering.md): off, warn, lower_lmbda (halve it), "
        "rollback (to the last sound checkpoint, lmbda and learning rate halved, at most twice), stop.",
    )
    collapse_window: int = _field(5, "Steps whose rollouts collapse_guard (and lmbda=auto) judges together.")
    collapse_threshold: float = _field(
        0.5, "A share of bad rollouts fires collapse_guard at this part of the way from where it should be to 1."
    )
    loss_chunk_size: int | None = _field(None, "Targets per chunk of the fused loss. None = from a byte budget.")
    loss_compile: bool | None = _field(
        None, "Run the loss's elementwise work through torch.compile. None = on CUDA where Triton is installed."
    )

    # --- sampling, all explicit: nothing leaks in from a model's own generation config ---
    mixing: str = _field(
        "sample", "sample: exactly the share lmbda in every optimizer step. batch: one coin per step (the paper)."
    )
    top_p: float = _field(1.0, "Nucleus sampling of rollouts; 1 = off.")
    top_k: int = _field(0, "Top-k sampling of rollouts; 0 = off.")
    min_p: float | None = _field(None, "Min-p sampling of rollouts; None = off.")
    repetition_penalty: float = _field(1.0, "Repetition penalty of rollouts; 1 = off.")
    generation_kwargs: dict[str, Any] | str | None = _field(
        None, "Further GenerationConfig fields for rollouts, as a dict or JSON. An unknown one is an error."
    )
    rollout_batch_size: int | None = _field(
        None,
        "Most sequences generated at a time: bounds the KV cache. None = per_device_train_batch_size x 4; on a GPU "
        "the whole optimizer step's, while their KV cache takes at most an eighth of it.",
    )
    rollout_every: int = _field(
        1,
        "One rollout for so many optimizer steps, from the weights of the first: a larger batch for who writes, and "
        "completions that are up to so many steps less one old (rollout/staleness).",
    )
    num_completions: int = _field(
        1,
        "Completions that the student writes for each prompt of a step (lmbda=1); per_device_train_batch_size counts "
        "them, so a step has that many fewer prompts.",
    )
    fold_adapter: bool = _field(
        True, "Fold a LoRA adapter into a copy of the weights for a rollout in this process: faster, more memory."
    )

    # --- servers ---
    rollout_backend: str = _field("hf", "Where the student writes: hf (in this process) or vllm (a server).")
    rollout_server: str | None = _field(
        None,
        "auto: the run starts a vLLM server on each node, and stops it. None = rollout_server_url names one.",
    )
    rollout_server_url: str | None = _field(
        None, "The student's vLLM server, http://host:port; several are comma separated."
    )
    rollout_adapter_dir: str | None = _field(
        None,
        "Folder of the adapter (of all weights, without one), which trainer and server must both see. None = "
        "<output_dir>/_rollout_adapters.",
    )
    rollout_server_sharing: str | None = _field(
        None, "sleep: the server is on the GPUs that train, and gives their memory back between two rollouts."
    )
    rollout_server_memory: float | None = _field(
        None,
        "Share of a GPU's memory that a server of the run's own takes while it is awake. None = 0.9, and 0.4 where it "
        "shares the GPU.",
    )
    vllm_python: str | None = _field(
        None, "Python of the environment in which vLLM is, for a server that the run starts. None = this one."
    )
    vllm_args: str | None = _field(None, "Further flags for a server that the run starts, as on a command line.")
    rollout_server_timeout: float = _field(
        SERVER_TIMEOUT, "Seconds that one request to a server may take in all, repetitions included."
    )
    server_proxy: str | None = _field(
        None, "An HTTP proxy to the servers, http://host:port. None = direct; the environment's is never used."
    )
    rollout_logprob_tolerance: float = _field(
        LOGPROB_TOLERANCE,
        "Most difference, in nats per token, between a server's log-probabilities of the tokens it sampled and the "
        "student's own in the same step; more is an error. 0 = not compared.",
    )
    rollout_staleness: int = _field(
        0, "0: every rollout is from the present weights. 1: a server writes the next step's while this one trains."
    )
    teacher_server_url: str | None = _field(
        None, "A vLLM server that scores as the teacher, in place of a teacher model; needs teacher_top_k."
    )
    teacher_server: str | None = _field(
        None, "auto: the run starts a vLLM server for teacher_model_name_or_path on each node; needs teacher_top_k."
    )
    teacher_chat_url: str | None = _field(
        None,
        "An OpenAI-compatible chat address, https://host/v1, that writes as the teacher (lmbda=0, seq_kd=True, "
        "seq_kd_loss=nll). Its key is taken from the environment variable OPENAI_API_KEY.",
    )
    teacher_chat_model: str | None = _field(None, "The model's name at teacher_chat_url.")

    # --- the output folder ---
    overwrite_output_dir: bool = _field(
        False, "Start anew in a folder that holds checkpoints of another run, and delete these. False = refuse it."
    )

    # --- what is shown ---
    log_completions: bool = _field(
        False, "Show sample completions of the training step, on the console and in W&B, Trackio and TensorBoard."
    )
    log_completions_steps: int | None = _field(None, "Show them every so many steps. None = with every training log.")
    num_completions_to_print: int = _field(
        COMPLETIONS_TO_PRINT, "Completions on the console; the loggers get all of the main process."
    )

    # --- data ---
    max_prompt_length: int | None = _field(
        None, "Most tokens of a prompt. None = max_length - max_new_tokens when anything is generated."
    )
    overlong_prompt: str = _field("drop", "A prompt over max_prompt_length: drop, keep_start or keep_end.")
    overlong_row: str = _field("cut", "A data row over max_length: cut (the end of the answer) or drop.")
    unanswered_rows: str = _field(
        "cut", "Where answers are needed: cut a chat that ends with a question behind its last answer, or drop it."
    )
    assistant_turns: str = _field("last", "Train on the last assistant turn, or on all of them (data rows).")

    def __post_init__(self) -> None:
        check_types(self, own=vars(GKDConfig)["__annotations__"])
        read_schedules(self)
        self._choose_for_cpu()
        if getattr(self, "data_seed", None) is None:
            # Otherwise the order of the rows comes from torch's global stream, and ranks whose streams differ (say,
            # after set_seed(..., device_specific=True)) would each shuffle in their own way.
            self.data_seed = self.seed
        check_dicts(self)
        check_accelerator_config(self)
        super().__post_init__()
        check_entries(self)
        check_counts(self)
        check_training_values(self)
        check_settings(self)
        check_values(self)
        check_options(self)
        check_schedules(self)
        check_collapse(self)
        loss_settings(self)
        for beta in schedule_of("beta", self.beta).values:
            for source, changed in zip(SOURCES, overrides(self, beta) or (), strict=False):
                loss_settings(self, changed=changed, source=source)
        check_servers(self)
        check_rollouts(self)
        check_logging(self)
        check_teacher(self)
        check_several(self)
        check_by_source(self)
        check_weights(self)

    def _choose_for_cpu(self) -> None:
        """Without an accelerator: use_cpu, without which accelerate leaves several processes apart and the Trainer
        refuses bf16; and bf16 only when the launch file says so, since TRL's default is made for GPUs."""
        if not torch.accelerator.is_available():
            self.use_cpu = True
            given: bool | None = getattr(self, "bf16", None)
            self.bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" if given is None else given

    def make_divergence(self, beta: float | None = None) -> Divergence:
        """The divergence that the fields name, with another beta where it is given, else that of the last step;
        ValueError for an unknown name, a parameter out of range or unused."""
        return common_divergence(self, schedule_of("beta", self.beta).values[-1] if beta is None else beta)

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, for loggers; secrets are hidden in nested dictionaries and addresses, too."""
        return redact_settings(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        """What the Trainer pickles beside the weights and pushes from there: access tokens have no business in it."""
        return without_secrets(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> GKDConfig:
        """A copy in this process is not published, so it keeps its secrets."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> GKDConfig:
        """A copy whose fields, dictionaries and lists can be set without changing this one. The device and DeepSpeed's
        plan are shared: which models are split up when they are loaded hangs on that one object."""
        copied = type(self).__new__(type(self))
        own = {name: copy.copy(value) if type(value) in (dict, list) else value for name, value in vars(self).items()}
        copied.__dict__.update(own)
        return copied

    def __str__(self) -> str:
        return redact_value(super().__str__())

    __repr__ = __str__

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The names of several teachers, in the order of their numbers; () for one."""
        assert not isinstance(self.teacher_adapters, str)  # TrainingArguments has parsed it
        assert not isinstance(self.teachers, str)
        return tuple(self.teachers or self.teacher_adapters or ())

    @property
    def each_teacher(self) -> dict[str | None, GKDConfig]:
        """Of every teacher that has fields of its own, a config in which it is the only one; under None this config,
        where there is one teacher, or one model with several adapters."""
        if self.teachers is None:
            return {None: self}
        return {name: config_of(self, name) for name in self.teacher_names}

    @property
    def teachers_on_base(self) -> tuple[str, ...]:
        """Those of `teachers` that stand on the model that the other fields name."""
        return tuple(n for n in self.teacher_names if self.teachers and stands_on_base(entry_of(self, n)))

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        """What the divergence of each of several teachers is multiplied by."""
        return tuple(weight_of(self, name) if self.teachers else 1.0 for name in self.teacher_names)

    @property
    def asks_teacher_server(self) -> bool:
        """Whether any teacher is on a server."""
        return any(one.teacher_is_elsewhere for one in self.each_teacher.values())

    @property
    def has_teacher_here(self) -> bool:
        """Whether any teacher is a model in this process."""
        return any(not one.teacher_is_elsewhere for one in self.each_teacher.values())

    @property
    def teacher_is_elsewhere(self) -> bool:
        """Whether the one teacher is on a server, or behind a chat address."""
        servers = (self.teacher_server_url, self.teacher_server, self.teacher_chat_url)
        return any(one is not None for one in servers)

    @property
    def cuts_to_top_k(self) -> bool:
        """Whether any teacher's distribution is cut to its most likely tokens."""
        own = (self.teacher_top_k_data, self.teacher_top_k_student, self.teacher_top_k_teacher)
        return any(one.teacher_top_k is not None for one in self.each_teacher.values()) or any(own)

    @property
    def shares_weights(self) -> bool:
        """Whether the teacher has no weights of its own to load: it is the student's base, or the student."""
        return self.share_base_model or self.self_teacher is not None

    @property
    def evaluates_along(self) -> bool:
        """Whether there are evaluations during the training."""
        return bool(self.eval_strategy != "no")

    @property
    def teacher_follows(self) -> bool:
        """Whether the teacher changes while the student trains, so that nothing it says can be kept."""
        return self.self_teacher in ("live", "ema")

    @property
    def starts_server(self) -> bool:
        """Whether the run starts a vLLM server."""
        return self.rollout_server is not None or self.teacher_server is not None

    @property
    def own_server_folder(self) -> str:
        """Where the log of a server of the run's own is."""
        return os.path.join(str(self.output_dir), "_vllm")

    @property
    def rollout_adapter_folder(self) -> str:
        """Where the student's adapter is written for a server; the underscore keeps it out of what goes to the Hub."""
        return self.rollout_adapter_dir or os.path.join(str(self.output_dir), "_rollout_adapters")

    @property
    def student_writes(self) -> bool:
        """Whether the student writes completions to train on, in any step."""
        return max(self.shares) > 0

    @property
    def decides_share(self) -> bool:
        """Whether the run itself decides what the student's share is."""
        return self.lmbda == AUTO

    @property
    def shares(self) -> tuple[float, ...]:
        """Of `lmbda`: no step's is outside of them, whatever a guard makes of it."""
        said = (0.0, 1.0) if self.decides_share else schedule_of("lmbda", self.lmbda).values
        return (*said, 0.0) if self.collapse_guard in ("lower_lmbda", "rollback") else said

    @property
    def most_new_tokens(self) -> int:
        """`max_new_tokens`, of the step that has most."""
        return int(max(schedule_of("max_new_tokens", self.max_new_tokens).values))

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes completions to train on, in any step: those that the student leaves."""
        return self.seq_kd and min(self.shares) < 1

    @property
    def reads_answers(self) -> bool:
        """Whether answers of the data are trained on, in any step."""
        return not self.seq_kd and min(self.shares) < 1

    @property
    def trains_on_nll_alone(self) -> bool:
        """Whether no token has a divergence, so that training needs the teacher's text at most, but not its scores."""
        of_text = self.teacher_writes and self.seq_kd_loss == "nll"
        return not self.student_writes and (of_text or self.ce_weight == 1)

    @property
    def nll_because(self) -> str:
        """The fields that make it so, for messages."""
        return "ce_weight=1 and lmbda=0" if self.ce_weight == 1 else "seq_kd_loss='nll' and lmbda=0"

    @property
    def needs_teacher(self) -> bool:
        """Whether training asks a teacher for anything. Where it does not, one that is named serves evaluations."""
        return self.teacher_writes or not self.trains_on_nll_alone

    @property
    def teacher_cache_folder(self) -> str | None:
        """Where the teacher's sequences are kept; None when they are not, as those of a teacher that changes.

        The default's name starts with an underscore: the Trainer leaves such files out of what it pushes to the Hub.
        """
        if self.teacher_follows:
            return None
        if self.teacher_cache_dir is None:
            return os.path.join(str(self.output_dir), "_teacher_sequences")
        off = self.teacher_cache_dir.lower() in ("", "off", "false")
        return None if off else self.teacher_cache_dir

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt: `max_prompt_length`, else what `max_length` leaves for it."""
        if self.max_prompt_length is not None or self.max_length is None:
            return self.max_prompt_length
        generated = self.most_new_tokens if self.student_writes or self.teacher_writes else 1
        if generated >= self.max_length:  # a bound for rows of the data, then: rollouts go beyond it
            generated = 1
        if self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and a token behind it: raise it"
            )
        return self.max_length - generated
