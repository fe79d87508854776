"""`GKDConfig`: its fields, and which go together.

by_source: fields that hold for the sequences of one source: another divergence, another beta, another
    top-k
collapse: fields about the guard against collapse
completions: fields about sample completions in the log
field_types: values of the wrong kind: from Python a field takes anything, and from YAML what is written
    there
fields: `GKDConfig`: TRL's `SFTConfig` plus the fields of generalized knowledge distillation, with their
    range checks
rollouts: fields about how a rollout is used: for how many optimizer steps, and how many completions of
    a prompt
schedules: fields that may change along a training: a number, or a schedule as a text
servers: fields about servers: what is missing there, and what would have no effect
settings: from fields to settings objects, which hold the ranges and choices of what they hold
several: the field `teachers`: several teachers of any kind, each of which is a run's one teacher for
    its own rows
teacher: fields about the teacher: where it stands, what is kept of it, its adapters, and what goes together
training_values: fields of the base classes: values that the libraries meet long after the start, or
    never, refused with the config
values: single fields: sizes and choices that no settings object holds, and options that this
    trainer cannot honour
weights: fields about what a token, or a whole completion, counts: weights of tokens, and the reward term
"""

from gkd.config.fields import GKDConfig

__all__ = ["GKDConfig"]
