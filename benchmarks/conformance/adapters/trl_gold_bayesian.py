"""TRL's GOLDTrainer with the other way of merging tokens; all but teachers of another tokenizer is as by default."""

from __future__ import annotations

from conformance.adapters.trl_gold import SOURCES, TRLGOLD


class TRLGOLDBayesian(TRLGOLD):
    name = "TRL GOLD (bayesian)"
    sources = SOURCES
    otherwise_as = "trl_gold"
    merge = "bayesian"


ADAPTER = TRLGOLDBayesian()
