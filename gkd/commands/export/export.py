"""`gkd export`: what is asked for, and what it says at the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from gkd.commands.export.formats import TYPES, conversion, convert, find_converter, write_modelfile
from gkd.commands.export.merging import DTYPES, Merged, is_chat_model, save_merged
from gkd.common.ranges import one_of

KINDS = ("merged", "gguf", "ollama")


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how.

    Attributes:
        run: a run's output folder, or a checkpoint. to: one of KINDS.
        output: folder of the whole model; None is beside the run.
        dtype: of its weights. gguf_type: of the GGUF file's. llama_cpp: a clone of llama.cpp.
        trust_remote_code: let the model's own code run.
    """

    run: Path
    to: str = "merged"
    output: Path | None = None
    dtype: str = "auto"
    gguf_type: str = "auto"
    llama_cpp: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("--to", self.to, KINDS)
        one_of("--dtype", self.dtype, DTYPES)
        one_of("--gguf_type", self.gguf_type, TYPES)
        for name, default in (("gguf_type", "auto"), ("llama_cpp", None)):
            if self.to != "gguf" and getattr(self, name) != default:
                raise ValueError(f"--{name} has no effect with --to {self.to}: leave it out, or ask for --to gguf")

    @property
    def folder(self) -> Path:
        """Where the whole model goes."""
        run = self.run.resolve()
        return self.output or run.parent / f"{run.name}-merged"


def export(order: Order) -> list[str]:
    """Do it.

    Returns:
        Lines that say what is there now, and what can be done with it.

    Raises:
        ValueError: what `save_merged`, `find_converter` or `convert` refuse.
    """
    converter = find_converter(order.llama_cpp) if order.to == "gguf" else None
    made = save_merged(order.run, order.folder, order.dtype, trust_remote_code=order.trust_remote_code)
    lines = _about(made)
    folder = shlex.quote(str(made.folder))
    if order.to == "gguf":
        file = made.folder / f"{made.folder.name}.gguf"
        command = conversion(converter, made.folder, file, order.gguf_type)
        if converter is None:
            return [*lines, "no converter on the PATH; in a clone of llama.cpp:", f"  {shlex.join(command)}"]
        convert(command)
        return [*lines, f"wrote {file}", f"  llama-cli -m {shlex.quote(str(file))}"]
    if order.to == "ollama":
        name = made.folder.name.lower()
        return [*lines, f"wrote {write_modelfile(made.folder)}", f"  cd {folder} && ollama create {name}"]
    chat = [f"  transformers chat {folder}"] if is_chat_model(made.folder) else []
    return [*lines, "use it:", *chat, f"  vllm serve {folder}", f'  pipeline("text-generation", "{made.folder}")']


def _about(made: Merged) -> list[str]:
    rounded = "" if made.bits is None else f", its {made.bits}-bit weights unpacked,"
    origin = "the run's own weights" if made.base is None else f"{made.base}{rounded} with the adapter"
    return [
        f"wrote {made.folder}: {made.parameters:,} weights in {made.dtype}, tokenizer and card",
        f"loaded again: logits within {made.largest_difference:.1e} of {origin} (largest {made.largest_logit:.0f})",
    ]
