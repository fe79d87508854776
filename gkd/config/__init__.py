"""`GKDConfig`: its fields, and which go together.

checks: ranges and choices of fields, which fields go together, and values that would be ignored or fail much
    later
field_types: values of the wrong kind: from Python a field takes anything, and from YAML what is written
    there
fields: `GKDConfig`: TRL's `SFTConfig` plus the fields of generalized knowledge distillation, with their
    range checks
"""

from gkd.config.fields import GKDConfig

__all__ = ["GKDConfig"]
