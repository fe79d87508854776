"""Models, rows and a tokenizer that all adapters are given. Built from transformers and tokenizers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import TURN_END, tiny_model, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

END, TURN_START_ID = 258, 257  # the end of a turn, and a token that nothing else means

# An answer ends with the end of its turn and nothing else, so that nobody need ask whether a blank line is trained on.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

_QUESTIONS = ["red?", "which river", "two apples", "sing", "the blue one or the other one", "7", "under", "why not"]
_ANSWERS = ["no", "the one in the valley", "yes, two", "la", "blue", "seven is a number", "a table", "because"]


def tokenizer(pad_is_end: bool = False) -> PreTrainedTokenizerBase:
    """Bytes, two special tokens, and <|im_end|> that ends a turn."""
    return tiny_tokenizer(pad_is_eos=pad_is_end, chat_template=TEMPLATE)


def rows(number: int = 4, answer_repeats: int = 1) -> list[list[dict[str, str]]]:
    """Conversations of a question and an answer, of several lengths."""
    return [
        [
            {"role": "user", "content": f"{i}: {_QUESTIONS[i % len(_QUESTIONS)]}"},
            {"role": "assistant", "content": " ".join([_ANSWERS[i % len(_ANSWERS)]] * answer_repeats)},
        ]
        for i in range(number)
    ]


def student(**options: Any) -> PreTrainedModel:
    """A small random model; it ends an answer with about one token in six."""
    return _likes(tiny_model("phi", seed=1, **options), END, 3.0)


def teacher(**options: Any) -> PreTrainedModel:
    """Another one, wider and deeper."""
    return tiny_model("phi", **{"hidden": 48, "layers": 3, "seed": 2, **options})


def _likes(model: PreTrainedModel, token: int, strength: float) -> PreTrainedModel:
    with torch.no_grad():
        model.lm_head.bias[token] += strength
    return model


def likes(model: PreTrainedModel, token: int, strength: float = 3.0) -> PreTrainedModel:
    """The same model, more inclined to write a token."""
    return _likes(model, token, strength)


def ends_with(model: PreTrainedModel, *tokens: int) -> PreTrainedModel:
    """The same model, whose generation config names these stop tokens."""
    model.generation_config = GenerationConfig(eos_token_id=list(tokens) or None, pad_token_id=256)
    return model


@dataclass
class Run:
    """One training run: plain SGD at learning rate 1 without clipping, so that one step changes the weights by minus
    the gradient.

    Attributes:
        folder: for what the trainer writes.
        share: of the rows that the student answers itself: 0 = the answers of the rows, 1 = its own.
        beta: of the generalized JSD. temperature: of sampling.
        batch, accumulation, steps, new_tokens, max_length, seed: as everywhere.
        conversations: the rows. eval_conversations: evaluated after every step, if given.
        save_steps: write a checkpoint every so many steps. resume: go on from that checkpoint.
        learning_rate: of SGD.
    """

    folder: str
    share: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    batch: int = 4
    accumulation: int = 1
    steps: int = 1
    new_tokens: int = 12
    max_length: int = 256
    seed: int = 3
    learning_rate: float = 1.0
    conversations: list[list[dict[str, str]]] = field(default_factory=rows)
    eval_conversations: list[list[dict[str, str]]] | None = None
    save_steps: int | None = None
    resume: str | None = None
    student: PreTrainedModel = field(default_factory=student)
    teacher: PreTrainedModel = field(default_factory=teacher)
    tokenizer: PreTrainedTokenizerBase = field(default_factory=tokenizer)

    def arguments(self) -> dict[str, Any]:
        """What every trainer of the transformers family takes by the same names."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "steps" if self.save_steps else "no",
            "save_steps": self.save_steps or 1,
            "eval_strategy": "steps" if self.eval_conversations else "no",
            "eval_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "bf16": False,
            "seed": self.seed,
            "beta": self.beta,
            "temperature": self.temperature,
        }

    def prompts(self) -> list[list[int]]:
        """The ids that a model is given to go on from, by row."""
        return [self.ids(row[:-1], add_generation_prompt=True) for row in self.conversations]

    def ids(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        """A conversation's ids."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


assert TURN_END == "<|im_end|>"
