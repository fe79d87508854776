"""Helpers of the data tests: rows prepared with the tiny tokenizer, and read back as texts."""

from datasets import Dataset
from tiny import tiny_tokenizer
from tokenizers import processors

from gkd.data.prepare import prepare_dataset

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Three."}
PROMPT_TEXT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TEXT = "Three.<|im_end|>"
GOOD = {"messages": [USER, ANSWER]}
THREE_TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2 <|im_end|> inside"},
    {"role": "user", "content": "u3"},
    {"role": "assistant", "content": "a3"},
]
THREE_ANSWERS = ["a1<|im_end|>", "a2 <|im_end|> inside<|im_end|>", "a3<|im_end|>"]


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prepare(rows, tokenizer=TOKENIZER, **options):
    options = {"max_length": None, "max_prompt_length": None, **options}
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer, **options)


def one(row, tokenizer=TOKENIZER, **options):
    return prepare([row], tokenizer, **options)[0][0]


def parts(prepared, tokenizer=TOKENIZER):
    """The prompt's text, and the text of each run of targets."""
    runs, before = [], -100
    for label in prepared["labels"]:
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], label]] if before != -100 else [*runs, [label]]
        before = label
    prompt = prepared["input_ids"][: prepared["prompt_length"]]
    return tokenizer.decode(prompt), [tokenizer.decode(run) for run in runs]


def with_template(template, **options):
    return tiny_tokenizer(chat_template=template, **options)


def tokenizer_with_bos(template):
    """Adds <|endoftext|> as BOS, and an eos, whenever it is asked for special tokens."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    assert tokenizer("a")["input_ids"] == [256, 64, 258]
    return tokenizer
