"""The commands that serve a run to other programs."""

from __future__ import annotations

import shlex
from pathlib import Path

from gkd.commands.export.merging import check_run
from gkd.servers.engine import LORA_RANKS
from gkd.training.origin import read_origin


def serving(run: Path) -> list[str]:
    """Lines for a shell.

    Raises:
        ValueError: there is no model in the folder.
    """
    adapter = check_run(run)
    folder = shlex.quote(str(run))
    if adapter is None:
        return [f"vllm serve {folder}", f"transformers serve {folder}"]
    base, rank = str(adapter["base_model_name_or_path"]), int(adapter.get("r") or 8)
    room = next((most for most in LORA_RANKS if most >= rank), rank)
    template = run / "chat_template.jinja"
    parts = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room)]
    parts += ["--lora-modules", f"{run.resolve().name}={run}"]
    packed = read_origin(run).quantization or {}
    parts += ["--quantization", "bitsandbytes"] if packed.get("load_in_4bit") else []  # as the run's student was
    parts += ["--chat-template", str(template)] if template.is_file() else []
    merged = shlex.quote(str(run.resolve().parent / f"{run.resolve().name}-merged"))
    return [
        "# base and adapter side by side, each by its name:",
        shlex.join(parts),
        "# one model:",
        f"gkd export {folder}",
        f"vllm serve {merged}",
        f"transformers serve {merged}",
    ]
