"""Every chat template that TRL carries: where rollouts start, what is trained on, with what a turn ends."""

from functools import cache

import jinja2
import pytest
from datasets import Dataset
from prepared import parts, with_template
from real_templates import NAMES, stop_ids_of, stops_of, tokenizer_of
from tiny import CHATML, tiny_tokenizer

from gkd.data.encode import RowEncoder
from gkd.data.formats import canonical_row
from gkd.data.last_turn import LastTurn
from gkd.data.prepare import prepare_dataset
from gkd.data.row_values import RowPlace
from gkd.data.vocabulary import end_of_turn


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"word": "owl"}}}
WORD = {"type": "object", "properties": {"word": {"type": "string", "description": "w"}}, "required": ["word"]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "finds a word", "parameters": WORD}}]
TOOL_LOOP = [
    turn("user", "Asked1"),
    turn("assistant", "", tool_calls=[CALL]),
    turn("tool", "FOUND", name="look_up", tool_call_id="call00001"),
    turn("assistant", "Said2"),
]
CHATS = {
    "one turn": {"messages": [turn("user", "Asked1"), turn("assistant", "Said1")]},
    "three turns": {
        "messages": [
            turn(role, f"{said}{i}") for i in "123" for role, said in (("user", "Asked"), ("assistant", "Said"))
        ]
    },
    "a system turn": {
        "messages": [
            turn("system", "Be brief."),
            *(turn(role, f"{said}{i}") for i in "12" for role, said in (("user", "Asked"), ("assistant", "Said"))),
        ]
    },
    "tools": {"messages": [*TOOL_LOOP, turn("user", "Asked3"), turn("assistant", "Said3")], "tools": TOOLS},
    "tools twice": {"messages": [*TOOL_LOOP, *TOOL_LOOP[:-1], turn("assistant", "Said4")], "tools": TOOLS},
}
IMAGES_TOO = ("idefics3", "llava_next", "smolvlm")  # contents are lists of parts


def served(name, row, messages):
    """What a server makes of these messages; None where the template refuses them."""
    if name.startswith(IMAGES_TOO):
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        return tokenizer_of(name).apply_chat_template(messages, tools=row.get("tools"), add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError):
        return None


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(IMAGES_TOO)])
@pytest.mark.parametrize("before", [[], [turn("user", "Asked1"), turn("assistant", "Said1")]])
def test_tables_show_the_last_question_alone(name, before):
    """Without the system turn that a template writes of its own accord, and its signs around a turn."""
    tokenizer, question = tokenizer_of(name), "The question?\nIts second line."
    turns = [*before, turn("user", question)]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert LastTurn(tokenizer)(prompt) == question
    assert LastTurn(tokenizer)("no chat at all") == "no chat at all"


@cache
def encoder_of(name, turns):
    return RowEncoder(tokenizer_of(name), turns, stop_ids_of(name))


def encoded(name, row, turns="last"):
    return encoder_of(name, turns).encode(canonical_row(row, RowPlace("train", 0), True), RowPlace("train", 0))


def targets(name, row):
    columns = {"input_ids": row.input_ids, "labels": row.labels, "prompt_length": row.prompt_length}
    return parts(columns, tokenizer_of(name))[1]


def without_double_bos(ids, bos):
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_start_from_what_the_model_is_served_with(name):
    bos = tokenizer_of(name).bos_token_id
    for row in CHATS.values():
        *messages, answer = row["messages"]
        expected = served(name, row, messages)
        if expected is None or served(name, row, row["messages"]) is None:
            assert len(messages) > 1  # a plain question is never refused
            continue
        prompt_only = encoded(name, {**row, "messages": messages})
        for turns in ("last", "all"):
            prepared = encoded(name, row, turns)
            assert prepared.prompt == prompt_only.prompt == without_double_bos(expected["input_ids"], bos)
            assert answer["content"] not in tokenizer_of(name).decode(prepared.prompt)
            assert [i for i in prepared.labels[: prepared.prompt_length] if i != -100] == [] or turns == "all"
            assert answer["content"] in targets(name, prepared)[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_assistant_turn_is_found_and_ends_with_a_trained_stop_token(name):
    for kind, row in CHATS.items():
        if served(name, row, row["messages"]) is None:
            continue
        prepared = encoded(name, row, "all")
        if (name, kind) == ("deepseekv3_training", "tools twice"):  # its second call has no header, as if a tool spoke
            assert "turn_not_found" in prepared.notes
            continue
        found, said = targets(name, prepared), [m for m in row["messages"] if m["role"] == "assistant"]
        lost = "calls_left_out" in prepared.notes
        expected = [m["content"] or "look_up" for m in said if m["content"] or not lost]
        assert len(found) == len(expected)
        for target, text in zip(found, expected, strict=True):
            assert text in target
            assert not any(other in target for other in ("Asked", "FOUND", "Be brief", *(set(expected) - {text})))
            # gpt-oss writes an earlier answer's end otherwise than that of the last
            ends = [*stops_of(name), "<|end|>"] if name.startswith("gptoss") else stops_of(name)
            assert target.endswith(tuple(ends))
            assert sum(target.count(end) for end in stops_of(name)) <= 1  # no second one behind it
        assert "turn_not_found" not in prepared.notes
        assert prepared.input_ids[-1] in stop_ids_of(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "training" not in name])
def test_what_a_template_leaves_out_is_told(name):
    """The right value comes from comparing renderings with and without it."""
    tokenizer = tokenizer_of(name)
    question, answer = CHATS["one turn"]["messages"]
    rows = {
        "tools_left_out": {"messages": [question, answer], "tools": TOOLS},
        "calls_left_out": {"messages": [question, {**answer, "tool_calls": [CALL]}]},
        "thought_left_out": {"messages": [question, {**answer, "reasoning_content": "Hm."}]},
    }
    for note, row in rows.items():
        if served(name, row, row["messages"]) is not None:
            text = tokenizer.decode(encoded(name, row).input_ids)
            sign = {"tools_left_out": "finds a word", "calls_left_out": "owl", "thought_left_out": "Hm."}[note]
            assert (note in encoded(name, row).notes) == (sign not in text)


# ------------------------------------------------------------------------------------------------- parts of it

R1 = CHATML.replace("(message['content'] or '')", "message['content'].split('</think>')[-1]")


def report_of(row, tokenizer, **options):
    options = {"max_length": None, "max_prompt_length": None, **options}
    rows, report = prepare_dataset(Dataset.from_list([row]), tokenizer, **options)
    return parts(rows[0], tokenizer)[1], report


def test_a_thought_that_the_template_throws_away_is_told_of():
    row = {"messages": [turn("user", "6 x 7?"), turn("assistant", "<think>Six sevens.</think>\n\nIt is 42.")]}
    trained, report = report_of(row, with_template(R1))
    assert trained == ["\n\nIt is 42.<|im_end|>"]
    assert report.rows_with == {"answer_shortened": [0]}
    assert "1 note: the chat template leaves out a part of the answer" in str(report)
    assert "chat_template_path" in str(report)
    assert report_of(row, tiny_tokenizer())[1].rows_with == {}


def test_an_empty_thought_of_the_templates_is_told_of():
    template = CHATML.replace(
        "(message['content'] or '')",
        "('<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last else '') + message['content']",
    )
    row = CHATS["three turns"]
    trained, report = report_of(row, with_template(template))
    assert trained == ["<think>\n\n</think>\n\nSaid3<|im_end|>"]
    assert report.rows_with == {"empty_thought": [0]}
    assert "{'enable_thinking': false}" in str(report)
    given = {"messages": [turn("user", "Asked"), turn("assistant", "<think>\n</think>Said")]}
    assert report_of(given, tiny_tokenizer())[1].rows_with == {}  # the data's own


def test_contents_and_options_that_are_not_written_are_told_of():
    no_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    row = {**CHATS["a system turn"], "chat_template_kwargs": {"depth": 3}}
    _, report = report_of(row, with_template(no_system))
    assert report.rows_with == {"content_left_out": [0], "options_left_out": [0]}


@pytest.mark.parametrize("system", ["  Be\n brief. ", '{"be": "brief"}', "Say <|im_end|> “now”"])
def test_contents_that_are_written_otherwise_are_not_left_out(system):
    """Trimmed, or as JSON."""
    row = {"messages": [turn("system", system), turn("user", " Asked "), turn("assistant", " Said\n")]}
    for how in ("| trim", "| tojson"):
        template = CHATML.replace("(message['content'] or '')", f"(message['content'] {how})")
        assert report_of(row, with_template(template))[1].rows_with == {}


def test_the_end_of_a_turn_is_the_token_that_the_model_stops_at():
    tokenizer = tokenizer_of("cohere2")
    assert end_of_turn(tokenizer).kept == "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    phi = tokenizer_of("phi3")  # <|end|> ends a turn, <|endoftext|> the chat, and the model stops at both
    assert end_of_turn(phi).kept == end_of_turn(phi, stop_ids_of("phi3")).kept == "<|end|>"


def test_a_row_that_no_template_can_write_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"row 0: .*System role not supported.*chat_template_path.*formatting_func"):
        report_of(CHATS["a system turn"], tokenizer_of("gemma"))


# -------------------------------------------------------------------------------------------------- long chats


class Counting:
    """Letters and messages that go through the tokenizer and its template."""

    def __init__(self, tokenizer, monkeypatch):
        self.letters = self.messages = 0
        call, apply = type(tokenizer).__call__, type(tokenizer).apply_chat_template

        def counted_call(this, text, *args, **kwargs):
            self.letters += len(text)
            return call(this, text, *args, **kwargs)

        def counted_apply(this, conversation, *args, **kwargs):
            self.messages += len(conversation)
            return apply(this, conversation, *args, **kwargs)

        monkeypatch.setattr(type(tokenizer), "__call__", counted_call)
        monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted_apply)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3_2"])
@pytest.mark.parametrize("kind", ["talk", "tools"])
def test_the_work_grows_with_the_length_of_a_chat_and_no_faster(name, kind, monkeypatch):
    if kind == "tools" and served(name, CHATS["tools"], CHATS["tools"]["messages"]) is None:
        return
    work = []
    for n in (5, 40):
        round_of = CHATS["tools twice"] if kind == "tools" else CHATS["three turns"]
        row = {**round_of, "messages": round_of["messages"] * n}
        with monkeypatch.context() as patch:
            counter = Counting(tokenizer_of(name), patch)
            prepared = encoded(name, row, "all")
        assert len(targets(name, prepared)) == sum(m["role"] == "assistant" for m in row["messages"])
        work.append((counter.letters, counter.messages))
    assert work[1][0] < 9 * work[0][0]
    assert work[1][1] < 9 * work[0][1]
