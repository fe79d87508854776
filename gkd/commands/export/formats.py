"""Files for other programs: llama.cpp's converter, and Ollama's Modelfile."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def find_converter(llama_cpp: Path | None) -> Path | None:
    """llama.cpp's converter: in its clone, or on the PATH; None where it is not.

    Raises:
        ValueError: the clone that was named has none.
    """
    if llama_cpp is not None:
        path = llama_cpp / CONVERTER
        if not path.is_file():
            raise ValueError(f"--llama_cpp {str(llama_cpp)!r} holds no {CONVERTER}: name a clone of llama.cpp")
        return path
    found = shutil.which(CONVERTER)
    return None if found is None else Path(found)


def conversion(converter: Path | None, folder: Path, file: Path, kind: str) -> list[str]:
    """The command that makes the GGUF file; without a converter, the one to be run in a clone of llama.cpp."""
    script = CONVERTER if converter is None else str(converter)
    first = "python" if converter is None else sys.executable
    return [first, script, str(folder.resolve()), "--outfile", str(file.resolve()), "--outtype", kind]


def convert(command: list[str]) -> None:
    """Run it; what it prints is shown.

    Raises:
        ValueError: it fails.
    """
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise ValueError(f"the converter ended with {done.returncode}: {shlex.join(command)}")


def write_modelfile(folder: Path) -> Path:
    """A Modelfile beside a whole model: Ollama reads weights, tokenizer and template from the folder, and stops where
    the model was trained to."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = ["FROM ."]
    lines += [f"PARAMETER stop {json.dumps(token)}" for token in _stop_tokens(folder, tokenizer)]
    length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if length:
        lines.append(f"PARAMETER num_ctx {min(int(length), 8192)}")
    path = folder / "Modelfile"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _stop_tokens(folder: Path, tokenizer: object) -> list[str]:
    ids = {getattr(tokenizer, "eos_token_id", None)}
    if (folder / "generation_config.json").is_file():
        said = GenerationConfig.from_pretrained(folder).eos_token_id
        ids |= set(said) if isinstance(said, list) else {said}
    known = sorted(i for i in ids if i is not None)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(known)]  # type: ignore[attr-defined]
