"""The broken student: the walk's teacher without its middle layer.

python studies/grid_walk/models.py        # the teacher, some minutes of one core
python studies/warm_start/models.py       # at once
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "grid_walk"))
from models import ALPHABET, MODELS

STUDENT = Path("outputs/warm_start_models/student")
KEPT = (0, 2)  # of three layers


def main() -> None:
    """Take the layer out."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "teacher", dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in KEPT)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(KEPT)
    ALPHABET.save(model, STUDENT)


if __name__ == "__main__":
    main()
