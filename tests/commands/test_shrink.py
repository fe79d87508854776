"""`gkd shrink`: a student that is its teacher without the layers that change the hidden state least."""

import json

import pytest
import torch
from smaller import assert_writes_with_its_cache_as_without, logits
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.cli import main
from gkd.models.shrink import changes, layers_of, least_changing, with_layers

IDS = [[257, 65, 66, 67, 68], [257, 70, 71, 258, 10, 72, 73, 74]]
KINDS = ["qwen2", "llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mistral", "olmo2"]


def quiet(model, numbers, by=0.02):
    """The model, with layers that change little."""
    with torch.no_grad():
        for number in numbers:
            for name, weight in layers_of(model)[1][number].named_parameters():
                if weight.dim() > 1 and "norm" not in name:
                    weight.mul_(by)
    return model


@torch.no_grad()
def passed_over(model, kept, ids):
    """The definition: every other layer gives back what it gets."""
    _, layers = layers_of(model)
    hooks = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: (
                (args[0] if args else kwargs["hidden_states"], *output[1:])
                if isinstance(output, tuple)
                else (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        for number, layer in enumerate(layers)
        if number not in kept
    ]
    found = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_some_layers_is_the_model_that_passes_over_the_others(kind, tmp_path):
    """Loaded again by plain transformers, whose caches and kinds of attention go by a layer's number."""
    model, kept = tiny_model(kind, layers=5, seed=3), (0, 2, 4)
    smaller = with_layers(model, kept)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for ids in IDS:
        expected = passed_over(model, kept, ids)
        torch.testing.assert_close(logits(again, ids), expected, rtol=1e-5, atol=1e-5)
    assert (logits(model, IDS[0]) - expected[:, : len(IDS[0])]).abs().max() > 1e-3 or len(IDS[0]) != expected.shape[1]
    assert_writes_with_its_cache_as_without(again, IDS[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_of_16_bits_has_a_student_of_16_bits(folder, dtype, tmp_path, capsys):
    """Whose rotary frequencies are not rounded: a folder that says something else than in memory is refused."""
    narrow = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=getattr(torch, dtype))
    narrow.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    sizes = ["--layers", "3", "--width", "40", "--output", str(tmp_path / "out")]
    assert main(["shrink", str(tmp_path / "teacher"), *sizes, "--rows", str(folder / "rows.jsonl")]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in student.parameters()} == {getattr(torch, dtype)}


def test_changes_are_one_minus_the_cosine_of_what_goes_in_and_comes_out():
    model = tiny_model(layers=4, seed=2)
    for run in (1, 2, 3):
        sums, count = torch.zeros(5 - run, dtype=torch.float64), 0
        for ids in IDS:
            with torch.no_grad():
                states = list(model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states)
                # the last of them has gone through the final norm: the layer's own output is what that was given
                states[-1] = model.model.layers[-1](
                    states[-2],
                    position_embeddings=model.model.rotary_emb(states[-2], torch.arange(len(ids))[None]),
                    attention_mask=torch.full((len(ids),) * 2, float("-inf")).triu(1)[None, None],
                )
            for first in range(5 - run):
                a, b = states[first][0].double(), states[first + run][0].double()
                sums[first] += (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum()
            count += len(ids)
        assert changes(model, IDS, run) == pytest.approx((sums / count).tolist(), abs=1e-5)


def test_what_changes_least_goes_and_the_last_layer_stays():
    assert least_changing(quiet(tiny_model(layers=6, seed=4), (2, 3)), IDS, 4) == (0, 1, 4, 5)
    apart = quiet(tiny_model(layers=6, seed=4), (1, 3))
    assert least_changing(apart, IDS, 4, in_one=False) == (0, 2, 4, 5)
    assert least_changing(quiet(tiny_model(layers=3, seed=4), (2,)), IDS, 2)[-1] == 2
    assert least_changing(quiet(tiny_model(layers=3, seed=4), (2,)), IDS, 2, in_one=False)[-1] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shrink")
    quiet(tiny_model(layers=5, seed=4, tie_word_embeddings=True), (1, 2)).save_pretrained(path / "teacher")
    tiny_tokenizer().save_pretrained(path / "teacher")
    save_tiny(path / "mixture", "mixtral", num_local_experts=2)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    return path


@pytest.mark.parametrize("rows", ["rows.jsonl", "gkd_qwen2", "mine.py"])
def test_the_command_writes_a_folder_that_trains(folder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "mine.py").write_text(
        "from gkd.run import run\nfrom datasets import Dataset\n"
        "run(lambda settings: {'train': Dataset.from_dict({'prompt': ['one two', 'river']})})\n"
    )
    source = rows if rows == "gkd_qwen2" else folder / rows
    argv = ["shrink", str(folder / "teacher"), "--layers", "3", "--rows", str(source)]
    if rows == "gkd_qwen2":
        from datasets import Dataset

        data = {"train": Dataset.from_list(tiny_rows(4))}
        monkeypatch.setattr("gkd.commands.shrink.recipe_data", lambda load_data, settings: data)
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "left out layers 1-2 of 0-4" in said
    out = tmp_path / "outputs" / "teacher-3-layers"
    student = AutoModelForCausalLM.from_pretrained(out).eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    torch.testing.assert_close(logits(student, IDS[0]), passed_over(teacher, (0, 3, 4), IDS[0]), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    assert isinstance(student.lm_head, nn.Linear)
    assert student.lm_head.weight is student.get_input_embeddings().weight, "tied as the teacher's"


@torch.no_grad()
def silenced(model, kept, ids, width):
    """The definition: of every layer's inner neurons only these are read."""
    hooks = []
    for layer, numbers in zip(model.model.layers, kept, strict=True):
        stay = torch.zeros(width).index_fill(0, numbers, 1.0)
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, stay=stay: (args[0] * stay,)))
    found = model(input_ids=torch.tensor([ids])).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("layers", [None, 3])
def test_a_width_takes_inner_neurons_out_after_the_layers(folder, layers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = [] if layers is None else ["--layers", str(layers)]
    argv = ["shrink", str(folder / "teacher"), "--width", "24", *more, "--rows", str(folder / "rows.jsonl")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "40 of 64 inner neurons in every layer" in said
    assert ("left out layers 1-2 of 0-4 and" in said) == (layers == 3)
    student = AutoModelForCausalLM.from_pretrained(
        tmp_path / "outputs" / ("teacher-24-wide" if layers is None else "teacher-3-layers-24-wide")
    ).eval()
    assert student.config.intermediate_size == 24
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    if layers is not None:  # which neurons count is another question without the layers
        teacher = with_layers(teacher, (0, 3, 4))
    kept = []
    for large, small in zip(teacher.model.layers, student.model.layers, strict=True):
        columns = large.mlp.down_proj.weight.T[:, None] == small.mlp.down_proj.weight.T
        kept.append(columns.all(-1).any(1).nonzero()[:, 0])
    assert [len(numbers) for numbers in kept] == [24] * len(student.model.layers)
    assert len({tuple(numbers.tolist()) for numbers in kept}) > 1, "each layer's own"
    torch.testing.assert_close(logits(student, IDS[1]), silenced(teacher, kept, IDS[1], 64), rtol=1e-5, atol=1e-5)
    assert (logits(student, IDS[1]) - logits(teacher, IDS[1])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["{t}", "--rows", "{r}"], "say what to shrink it to: --layers N, --width N"),
        (["{t}", "--width", "64", "--rows", "{r}"], "--width 64: the MLPs of '{t}' have 64 inner neurons, so keep 1"),
        (["{t}", "--width", "0", "--rows", "{r}"], "--width 0: the MLPs of '{t}' have 64 inner neurons, so keep 1"),
        (["{t}", "--width", "9", "--single", "--rows", "{r}"], "--single has no effect without --layers"),
        (["{m}", "--width", "9", "--rows", "{r}"], "MixtralForCausalLM has no dense MLP in every layer"),
        (["{t}", "--layers", "5", "--rows", "{r}"], "--layers 5: '{t}' has 5, so keep 1 to 4"),
        (["{t}", "--layers", "0", "--rows", "{r}"], "--layers 0"),
        (["{t}", "--layers", "2", "--rows", "nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere", "--layers", "2", "--rows", "{r}"], "'nowhere'"),
        (["{t}", "--layers", "2", "--rows", "{r}", "--output", "{t}"], "is not empty: name another folder"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, argv, told):
    named = {"t": folder / "teacher", "r": folder / "rows.jsonl", "m": folder / "mixture"}
    with pytest.raises(SystemExit) as stopped:
        main(["shrink", *(part.format(**named) for part in argv)])
    assert stopped.value.code == 2
    assert told.format(**named) in capsys.readouterr().err.splitlines()[-1]


def test_a_quantized_teacher_is_refused(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = save_tiny(tmp_path / "plain", hidden=128)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    (tmp_path / "rows.jsonl").write_text(json.dumps(tiny_rows(1)[0]) + "\n")
    with pytest.raises(SystemExit):
        main(["shrink", str(tmp_path / "packed"), "--layers", "1", "--rows", str(tmp_path / "rows.jsonl")])
    assert "is quantized: shrink the model that it was made from" in capsys.readouterr().err
