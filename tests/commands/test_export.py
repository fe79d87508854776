"""`gkd export`: the folder that plain transformers loads says what base and adapter say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_tiny, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline
from user import flags

from gkd.cli import main
from gkd.models.quantized import keep_layout

IDS = torch.tensor([[257, 65, 66, 67, 68, 69, 258, 10, 257, 70]])
LINEAR = ["q_proj", "v_proj", "down_proj"]
CARD = "---\nlibrary_name: peft\nbase_model: some/model\n---\n# mine\n"


def run_folder(path: Path, base: str, targets=LINEAR, model=None) -> Path:
    """An adapter that says something, as a run leaves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto") if model is None else model
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "README.md").write_text(CARD)
    return path


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def beside(base, run, dtype="auto"):
    """Base and adapter, as PEFT computes them; the adapter apart from a tied partner of its layer."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), run).eval())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [LINEAR, [*LINEAR, "lm_head"]], ids=["layers", "layers and head"])
def test_a_merged_folder_says_what_base_and_adapter_say(tmp_path, capsys, tied, targets):
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    run = run_folder(tmp_path / "run", base, targets)
    assert main(["export", str(run)]) == 0
    folder = tmp_path / "run-merged"
    whole = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(whole), beside(base, run), rtol=1e-5, atol=1e-5)
    assert (logits(whole) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1, "an adapter"
    assert whole.config.tie_word_embeddings == (tied and "lm_head" not in targets)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer().chat_template
    assert whole.generation_config.eos_token_id == 258
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"
    written = pipeline("text-generation", str(folder))("a", max_new_tokens=2, do_sample=False)
    assert written[0]["generated_text"].startswith("a")
    said = capsys.readouterr().out
    assert f"vllm serve {folder}" in said
    assert f"transformers chat {folder}" in said


def served_in_four_bits(base, run, **options):
    """Base and adapter, computed from the packed weights themselves."""
    packed = keep_layout(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options))
    assert packed.is_quantized
    return logits(PeftModel.from_pretrained(packed, run).eval())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_base_of_four_bits_on_disk_is_unpacked(tmp_path, capsys, tied):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = save_tiny(tmp_path / "plain", hidden=128, initializer_range=0.05, tie_word_embeddings=tied)
    four = BitsAndBytesConfig(**NF4)
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    run = run_folder(tmp_path / "run", str(tmp_path / "base"))
    assert main(["export", str(run), "--dtype", "float32"]) == 0
    assert f"of {tmp_path / 'base'}, its 4-bit weights unpacked, with the adapter" in capsys.readouterr().out
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run-merged")
    assert not getattr(whole, "is_quantized", False)
    four_bits = served_in_four_bits(tmp_path / "base", run)
    torch.testing.assert_close(logits(whole), four_bits, rtol=1e-5, atol=1e-5)
    # another road to the same: transformers' own layout for processors with AVX512-BF16 computes in bf16
    torch.testing.assert_close(logits(whole), beside(tmp_path / "base", run, torch.float32), rtol=0.05, atol=0.05)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(loaded, run)
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    packed_weight = layer.base_layer.weight
    plain_weight = bitsandbytes.functional.dequantize_4bit(packed_weight.data, packed_weight.quant_state).float()
    wanted = plain_weight + 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight  # alpha / r = 8 / 2
    torch.testing.assert_close(whole.model.layers[1].self_attn.q_proj.weight, wanted)


def test_a_student_that_trained_in_four_bits_is_exported_asked_and_measured_with_its_rounding(tmp_path, capsys):
    """A real run: the base is whole on disk, and the adapter has learnt beside its rounded weights."""
    pytest.importorskip("bitsandbytes")
    base = save_tiny(tmp_path / "student", hidden=128, seed=1)
    save_tiny(tmp_path / "teacher", seed=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    (tmp_path / "recipe.py").write_text(
        "from gkd.run import dataset_by_name, run, with_held_out\nif __name__ == '__main__':\n"
        "    run(lambda settings: with_held_out(dataset_by_name(settings), 4), defaults={'use_peft': True})\n"
    )
    trained = flags(
        tmp_path,
        tmp_path / "run",
        load_in_4bit=True,
        learning_rate=0.05,
        max_steps=1,
        evaluate_before_and_after=False,
        num_eval_prompts=None,
    )
    assert main(["run", str(tmp_path / "recipe.py"), *trained]) == 0
    assert main(["export", str(tmp_path / "run"), "--dtype", "float32"]) == 0
    assert "its 4-bit weights unpacked, with the adapter" in capsys.readouterr().out
    whole = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run-merged"))
    rounded = served_in_four_bits(base, tmp_path / "run", quantization_config=BitsAndBytesConfig(**NF4))
    torch.testing.assert_close(whole, rounded, rtol=1e-3, atol=1e-3)
    unrounded = beside(base, tmp_path / "run")
    assert (whole - unrounded).abs().max() > 0.05, "the rounding says something"
    without = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**NF4))
    assert (whole - logits(keep_layout(without))).abs().max() > 0.05, "and so does the adapter"
    assert main(["chat", str(tmp_path / "run"), "--serve"]) == 0
    assert "--quantization bitsandbytes" in capsys.readouterr().out
    asked = ["--ask", "one", "--models", "before,after", "--max_new_tokens", "2", "--json"]
    assert main(["chat", str(tmp_path / "run"), *asked]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]["answers"]) == {"student before", "student after"}
    assert main(["evaluate", str(tmp_path / "recipe.py"), *trained, "--adapter", str(tmp_path / "run"), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)["models"]
    whole = {"model_name_or_path": tmp_path / "run-merged", "num_eval_prompts": None}
    assert main(["evaluate", str(tmp_path / "recipe.py"), *flags(tmp_path, tmp_path / "x", **whole), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)["models"]["student"]
    assert merged["perplexity"]["value"] == pytest.approx(packed["student + adapter"]["perplexity"]["value"], rel=1e-3)
    assert merged["perplexity"]["value"] != pytest.approx(packed["student"]["perplexity"]["value"], rel=0.01)
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "recipe.py"), *trained, "--use_peft", "false", "--overwrite_output_dir", "true"])
    assert "load_in_4bit=True without use_peft: packed weights are not trained" in capsys.readouterr().err


def test_narrow_weights_stay_narrow_unless_asked(tmp_path):
    base = save_tiny(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    run = run_folder(tmp_path / "run", base)
    assert main(["export", str(run), "--output", str(tmp_path / "a")]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "b"), "--dtype", "float32"]) == 0
    kept, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in "ab")
    assert (kept.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(
        logits(wide), logits(PeftModel.from_pretrained(wanted, run).eval()), rtol=1e-5, atol=1e-5
    )


def test_a_run_of_all_weights_is_exported_as_it_is(tmp_path, capsys):
    run = save_tiny(tmp_path / "run")
    assert main(["export", run, "--to", "ollama"]) == 0
    folder = tmp_path / "run-merged"
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(f)) for f in (run, folder)))
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines == ["FROM .", 'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 1024"]
    assert "ollama create run-merged" in capsys.readouterr().out


def test_gguf_without_a_converter_is_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["export", save_tiny(tmp_path / "run"), "--to", "gguf", "--gguf_type", "q8_0"]) == 0
    said = capsys.readouterr().out
    command = f"python convert_hf_to_gguf.py {tmp_path / 'run-merged'} --outfile {tmp_path / 'run-merged'}"
    assert command in said
    assert said.rstrip().endswith("--outtype q8_0")


@pytest.mark.parametrize("works", [True, False])
def test_gguf_with_a_converter_runs_it(tmp_path, capsys, works):
    """The converter is a script that writes down what it was given: llama.cpp's own needs a clone of it."""
    clone = tmp_path / "llama.cpp"
    clone.mkdir()
    script = (
        "import sys, json; json.dump(sys.argv[1:], open(sys.argv[3], 'w'))" if works else "import sys; sys.exit(3)"
    )
    (clone / "convert_hf_to_gguf.py").write_text(script)
    flags = ["export", save_tiny(tmp_path / "run"), "--to", "gguf", "--llama_cpp", str(clone)]
    folder = tmp_path / "run-merged"
    if works:
        assert main(flags) == 0
        given = json.loads((folder / "run-merged.gguf").read_text())
        assert given == [str(folder), "--outfile", str(folder / "run-merged.gguf"), "--outtype", "auto"]
        return
    with pytest.raises(SystemExit):
        main(flags)
    assert f"the converter ended with 3: {sys.executable}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["empty"], "holds no adapter_config.json and no model: a run saves it when it ends"),
        (["stopped"], "it has checkpoint-5, which can be exported"),
        (["run", "--output", "full"], "is not empty"),
        (["run", "--to", "onnx"], "--to='onnx'"),
        (["run", "--dtype", "int8"], "--dtype='int8'"),
        (["run", "--gguf_type", "f16"], "--gguf_type has no effect with --to merged"),
        (["run", "--to", "gguf", "--llama_cpp", "empty"], "holds no convert_hf_to_gguf.py"),
        (["run", "--lmbda", "1"], "unrecognized arguments"),
        (["moved"], "the adapter's base has to be where it was"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "stopped/checkpoint-5", "full", "moved"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "full" / "file").write_text("")
    save_tiny(tmp_path / "run")
    tiny_tokenizer().save_pretrained("moved")
    (tmp_path / "moved" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "gone"), "peft_type": "LORA"})
    )
    with pytest.raises(SystemExit) as ended:
        main(["export", *flags])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run-merged").exists()
