"""Secrets: no form of writing one down gets past the two nets, and ordinary text passes unchanged."""

import io
import json
import logging
import pickle
import sys

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import tiny_tokenizer
from training import config, trainer_of

from gkd.commands.doctor.view import Diagnosis, RowView, show
from gkd.common.errors import DiskFullError
from gkd.common.redact import REDACTED, is_secret_name, redact_settings, redact_value, redact_words, without_secrets
from gkd.data.prepare import prepare_dataset
from gkd.recipe.mistakes import mistakes_in_one_line
from gkd.servers.client import ServerError

SECRET = "s3cr3t-Pa55w0rd"  # nothing shows by its form: only what stands around it does
NAMES = ["hub_token", "token", "api_key", "apiKey", "X-Api-Key", "password", "AWS_SECRET_ACCESS_KEY", "client_secret"]
NAMES += ["auth.token", "HF_TOKEN", "accessToken", "db-password", "credentials"]

# {n} a name, {s} the secret
WAYS = [
    "--{n} {s}",
    "--{n}={s}",
    "python x.py --{n} '{s}' --bf16",
    "{n}={s}",
    "{n} = '{s}'",
    "export {n}={s}; run",
    "{n}: {s}",
    '"{n}": "{s}"',
    "'{n}': '{s}'",
    '{{"{n}":"{s}","r":8}}',
    '{{\\"{n}\\": \\"{s}\\", \\"r\\": 8}}',
    '{{\\\\\\"{n}\\\\\\": \\\\\\"{s}\\\\\\"}}',
    '{{"{n}": ["{s}", "{s}"]}}',
    '{{"{n}": {{"value": "{s}"}}}}',
    "{{'{n}': ['x', '{s}']}}",
    '{{"kwargs": "{{\\"{n}\\": \\"{s}\\"}}"}}',
    "Config({n}='{s}', r=8)",
    "http://host:8000/v1?{n}={s}",
    "http://host/v1?a=1&{n}={s}&b=2",
    "http://host/v1?a=1&amp;{n}={s}",
    "http://host/#{n}={s}",
    "http://host/v1?next=%2Fa%26{n}%3D{s}",
    "error: '{n}={s}' is no number",
    '{n}="{s}"',
]
# What needs no name.
FORMS = [
    "http://{s}@host",
    "http://{s}@host:8000/v1",
    "http://user:{s}@host:8000",
    "http://:{s}@host",
    "http://{s}:x-oauth-basic@host/path",
    "https://user:p@{s}@host/",
    "https://user:a/{s}@host/",
    "git+https://{s}@github.com/a/b@main",
    "https://a.example/b,http://u:{s}@host:1",
    '["http://u:{s}@host", "http://v:{s}@host"]',
    '{{"url": "http://u:{s}@host/v1"}}',
    "user:{s}@host:8000",
    "postgresql+psycopg2://u:{s}@db/x",
    "redis://:{s}@host/0",
    "https://b.example/o?X-Amz-Signature={s}&X-Amz-Expires=3600",
    "https://b.example/o?X-Amz-Credential={s}",
    "https://b.example/o?X-Amz-Security-Token={s}",
    "https://b.example/o?AWSAccessKeyId=x&Signature={s}",
    "https://b.example/o?sv=2024&sig={s}",
    "https://b.example/o?key={s}",
    "Authorization: Bearer {s}",
    "Authorization: Basic {s}==",
    "Authorization: {s}",
    "-H 'Authorization: Token {s}'",
    '{{"headers": {{"Authorization": "Bearer {s}"}}}}',
    "curl -H 'X-Api-Key: {s}' http://host",
    "bearer {s}",
]
BY_SHAPE = [
    "hf_" + "Lg5" * 11,
    "sk-proj-" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "glpat-" + "a1B2" * 5,
    "xoxb-1234567890-abcdefghijk",
    "AKIA" + "ABCD1234EFGH5678",
    "AIza" + "Sy1234567890abcdefghijklmnopqrstuvw",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123_-x",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIB" + "a1B2" * 8 + "\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_secret_behind_its_name_is_hidden(way, name):
    text = way.format(n=name, s=SECRET)
    shown = redact_value(text)
    assert SECRET not in shown, shown
    assert REDACTED in shown


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_in_an_address_or_header_is_hidden(form):
    shown = redact_value(form.format(s=SECRET))
    assert SECRET not in shown, shown


@pytest.mark.parametrize("secret", BY_SHAPE)
def test_known_kinds_of_tokens_are_hidden_wherever_they_stand(secret):
    for text in (secret, f"see {secret}.", f'{{"a": "{secret}"}}', f"x={secret}&y", f"[{secret}]", f"/p/{secret}/q"):
        assert secret not in redact_value(text)


URL_SAFE = st.text(st.sampled_from("abcXYZ0189-._~!$*+"), min_size=8, max_size=24)
QUOTED = st.text(st.sampled_from("abcXYZ0189-._~!$*+/@:,;&=#%(){}[]<> é"), min_size=8, max_size=24)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    secret=URL_SAFE, name=st.sampled_from(NAMES), way=st.sampled_from(WAYS), around=st.sampled_from(["", " x ", "\n"])
)
def test_any_secret_is_hidden_in_every_way_of_writing(secret, name, way, around):
    secret = f"a1{secret}z9"  # so that it is not by chance a part of what stands around it
    assert secret not in redact_value(around + way.format(n=name, s=secret) + around)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(secret=QUOTED, name=st.sampled_from(NAMES), depth=st.integers(0, 3))
def test_any_secret_is_hidden_in_json_within_json(secret, name, depth):
    secret = f"a1{secret}z9"
    text = json.dumps({"dtype": "auto", name: secret, "list": [{name: [secret, secret]}]}, ensure_ascii=False)
    for _ in range(depth):
        text = json.dumps({"kwargs": text}, ensure_ascii=False)
    shown = redact_value(text)
    assert secret not in shown, shown
    assert "auto" in shown


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_redacting_never_fails_and_twice_is_once(text):
    once = redact_value(text)
    assert redact_value(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "a basic understanding of hf_transfer",
        "The secret: patience. My password: none of your business",
        "the bearer of good news was here",
        "basic arithmetic-operations are easy",
        "token 900, where the vocabulary has 259",
        "tokens: 12, max_new_tokens=128, num_tokens: 5, nats_per_token: 0.5",
        "eos_token='<|im_end|>' pad_token: <pad>",
        "--eos_token <|im_end|> --learning_rate=1e-5",
        "hub_token=None token: null",
        "https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct",
        "git+https://github.com/a/b@main https://medium.com/@someone/x http://host:8000/a@b",
        "me@example.org wrote at 3:45 to you@example.org",
        "key=value; sig: x; a monkey: banana, keys = [1, 2]",
        "def f(key, code): return key[code]",
        "/data/auth/rows.jsonl",
        "sk-learn, ghp and glpat",
        "Skip-tokens-and-go-on-for-ever-and-ever",
    ],
)
def test_ordinary_text_passes_unchanged(text):
    assert redact_value(text) == text


@pytest.mark.parametrize(
    "name", ["eos_token", "max_new_tokens", "tokenizer", "author", "keyword", "hub_model_id", "secretary"]
)
def test_ordinary_names_are_no_secrets(name):
    assert not is_secret_name(name)


def test_words_behind_a_secret_flag_are_hidden_up_to_the_next_flag():
    words = ["x.py", "--hub_token", "a", "b", "--bf16", "--kwargs", '["--api_key", "b"]', "--api_key=c"]
    assert redact_words(words)[:5] == ["x.py", "--hub_token", REDACTED, REDACTED, "--bf16"]
    assert redact_words(words)[-1] == f"--api_key={REDACTED}"


def test_settings_are_redacted_in_lists_and_below():
    shown = redact_settings(
        {"a": [f"http://{SECRET}@h", {"token": SECRET}], "b": {"c": (f"--hub_token={SECRET}",)}, "n": 3}
    )
    assert SECRET not in str(shown)
    assert shown["n"] == 3
    assert without_secrets({"push_to_hub_token": "x", "hub_token": None, "n": 3}) == {
        "push_to_hub_token": None,
        "hub_token": None,
        "n": 3,
    }


def test_no_text_of_the_pickled_settings_holds_a_secret(tmp_path):
    """What the Trainer writes as training_args.bin into every checkpoint, and pushes to the Hub."""
    args = config(
        tmp_path,
        rollout_backend="vllm",
        rollout_server_url=f"http://{SECRET}@host:8000,http://u:{SECRET}@b:8000",
        rollout_server_timeout=5.0,
        run_name=f"http://host/?token={SECRET}",
        hub_token=SECRET,
        teacher_model_init_kwargs={"headers": [f"Authorization: Bearer {SECRET}"], "token": SECRET},
    )
    assert SECRET.encode() not in pickle.dumps(args)
    assert SECRET not in repr(args)
    assert SECRET not in args.to_json_string()
    assert args.rollout_server_url.count(SECRET) == 2  # the run itself still needs it


def test_the_process_s_arguments_lose_their_secrets_before_a_tracker_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--hub_token", SECRET, "--url", f"http://{SECRET}@h", "--lr", "1"])
    trainer_of(tmp_path, report_to=["tensorboard"])
    assert sys.argv == ["x.py", "--hub_token", REDACTED, "--url", f"http://{REDACTED}@h", "--lr", "1"]


# ------------------------------------------------------------------------------------- terminal escapes

ESCAPES = "\x1b]0;title\x07 \x1b]52;c;aGk=\x07 \x1b[2J \x9b31m \x90q\x9c \r \u202e"
OBEYED = set("\x1b\x07\x9b\x90\x9c\r\u202e")


def nothing_is_obeyed(text):
    assert not OBEYED & set(text), ascii(text)
    return True


def test_the_doctor_prints_no_escape_that_a_row_or_message_brings(monkeypatch):
    diagnosis = Diagnosis(rows=[RowView(1, [("prompt", ESCAPES), ("target", ESCAPES)])], rollouts=[(ESCAPES, ESCAPES)])
    diagnosis.add(f"Rows{ESCAPES}", "warning", f"column {ESCAPES}", f"rename {ESCAPES}")
    written = io.StringIO()
    show(diagnosis, Console(file=written, width=200))
    assert nothing_is_obeyed(written.getvalue())
    assert written.getvalue().count(r"\x1b]0;title\x07") == 7


def _log_and_fail(error):
    with mistakes_in_one_line():
        logging.getLogger("gkd.x").warning("the server says %s", f"{ESCAPES} token={SECRET}")
        raise error(f"column {ESCAPES} http://u:{SECRET}@host")


@pytest.mark.parametrize("error", [ValueError, ServerError, DiskFullError])
def test_an_error_s_one_line_and_logs_hold_neither_escape_nor_secret(capsys, error):
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        with pytest.raises(SystemExit):
            _log_and_fail(error)
    finally:
        root.handlers = before
    written = capsys.readouterr().err
    assert nothing_is_obeyed(written)
    assert SECRET not in written
    assert written.count(r"\x1b[2J") == 2


def test_what_a_template_says_of_a_row_holds_no_escape(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['content']) }}"
    row = {"messages": [{"role": "user", "content": ESCAPES}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="the chat template cannot render") as error:
        prepare_dataset(Dataset.from_list([row]), tokenizer, max_length=64, max_prompt_length=None)
    assert nothing_is_obeyed(str(error.value))
