"""Local data files: every kind gives the same rows; what is broken is named with its line."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkd.data.files import DATA_ENDINGS, read_rows
from gkd.recipe.rows import load_rows
from gkd.report.repo import is_repo_id

ROWS = [{"prompt": "a,b", "completion": "1"}, {"prompt": 'say "é"\u2028now', "completion": "2"}]


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", lines(ROWS)),
        ("rows.jsonl", "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("rows.json", lines(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("rows.CSV", 'prompt,completion\n"a,b",1\n"say ""é""\u2028now",2\n'),
        ("rows.tsv", 'prompt\tcompletion\na,b\t1\n"say ""é""\u2028now"\t2\n'),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, text):
    assert list(read_rows(written(tmp_path, name, text))) == ROWS


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == ROWS


def test_one_object_is_one_row_though_it_holds_a_list(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert list(read_rows(written(tmp_path, "row.json", json.dumps(row, indent=1)))) == [row]


def test_columns_of_later_rows_are_kept(tmp_path):
    rows = read_rows(written(tmp_path, "r.jsonl", lines([{"prompt": "a"}, {"prompt": "b", "completion": "c"}])))
    assert list(rows) == [{"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("r.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"r.jsonl, line 3: broken JSON: Expecting ',' delimiter"),
        ("r.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2: should be an object with columns, is a list"),
        ("r.json", '{"prompt": "a"}\n{"prompt": \n', "line 2: broken JSON: Expecting value"),
        ("r.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2: broken JSON: Expecting ':' delimiter"),
        ("r.json", '[{"prompt": "a"}, 3]', "row 1: should be an object with columns, is a int"),
        ("r.json", "3", "should hold a list of objects, holds a int"),
        ("r.jsonl", '[{"prompt": "a"},\n{"prompt": "b"}]', "line 1: broken JSON.* over several lines is .json"),
        ("r.jsonl", '{"prompt": ' + "[" * 100_000, "line 1: broken JSON"),
        ("r.jsonl", '{"n": ' + "9" * 5000 + "}", "line 1: broken JSON: Exceeds the limit"),
        ("r.jsonl", '{"prompt": "a"}\n{"prompt": ["\\ud800"]}', "row 1: column 'prompt' is not valid Unicode"),
        ("r.csv", "prompt,prompt\na,b\n", "line 1: the column 'prompt' stands twice"),
        ("r.csv", "prompt,completion\na,b\na,b,c\n", "line 3: too many or too few cells for 2 columns"),
        ("r.csv", "prompt,completion\na\n", "line 2: too many or too few cells"),
        ("r.csv", 'prompt,completion\n"a"x,b\n', "line 2: broken CSV"),
        ("r.jsonl", "", "is empty: it has no rows"),
        ("r.csv", "prompt,completion\n", "is empty: it has no rows"),
        ("r.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8 text: invalid start byte at byte 12"),
        ("r.parquet", "x", "not a readable Parquet file"),
        ("r.txt", "x", r"should end with one of \.json, \.jsonl"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, text, problem):
    with pytest.raises(ValueError, match=problem) as error:
        read_rows(written(tmp_path, name, text))
    assert str(tmp_path / name) in str(error.value)


# Valid files whose columns are of no one Arrow type: all of it is kept, each object with its own keys in their order.
ONE = {"role": "user", "content": "Hi"}
PARTS = [{"type": "text", "text": "Hi"}]
MIXED = {
    "arguments of two types": [{"messages": [{**ONE, "calls": [{"time": t}]}]} for t in ("noon", 12)],
    "text and parts": [{"messages": [ONE, {**ONE, "content": PARTS}]}],
    "an enum of number and text": [{"tools": [{"enum": [1, "a", None]}]}],
    "a column that nobody reads": [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x2"}],
    "text and a list": [{"prompt": "5"}, {"prompt": [ONE]}],
    "keys of one row": [{"tools": [{"a": 1, "b": None}]}, {"tools": [{"b": 2, "c": {"d": []}}]}],
    "the order of keys": [{"tools": [{"a": 1, "b": 1}]}, {"tools": [{"b": 1, "a": 1}]}],
    "whole numbers and others": [{"tools": [{"a": 1}]}, {"tools": [{"a": 1.5}]}],
    "empty ones": [{"tools": []}, {"tools": [{}]}, {"tools": None}],
}


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_values_of_several_types_are_kept_as_they_are(tmp_path, rows, name):
    text = lines(rows) if name.endswith("l") else json.dumps(rows)
    read = list(read_rows(written(tmp_path, name, text)))
    assert json.dumps(read) == json.dumps(rows)


def test_numbers_that_json_columns_would_change_are_kept_as_text(tmp_path):
    big = [{"prompt": "a", "id": 2**80, "tools": [{"n": 2**70}, "x"]}, {"prompt": "b", "id": None, "tools": None}]
    read = list(read_rows(written(tmp_path, "r.jsonl", lines(big))))
    assert read == [{**big[0], "id": str(2**80), "tools": json.dumps(big[0]["tools"])}, big[1]]


def test_a_key_that_stands_twice_is_told(tmp_path, caplog):
    text = '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}'
    assert read_rows(written(tmp_path, "r.jsonl", text))["prompt"] == ["a", "b"]
    assert "r.jsonl: the key 'prompt' stands twice in one object (line 2); its last value counts" in caplog.text
    read_rows(written(tmp_path, "r.json", '[{"messages": [{"role": "user", "role": "x"}]}]'))
    assert "r.json: the key 'role' stands twice in one object; its" in caplog.text


def test_long_cells(tmp_path):
    long = "x" * 150_011
    assert read_rows(written(tmp_path, "r.csv", f"prompt,completion\na,{long}\n"))[0]["completion"] == long


PARQUET = io.BytesIO()
pq.write_table(pa.Table.from_pylist([{**row, "turns": [{"n": 1}] * 3} for row in ROWS] * 3), PARQUET)
WHOLE = {
    "r.parquet": PARQUET.getvalue(),
    "r.jsonl": lines(ROWS * 3).encode(),
    "r.json": json.dumps(ROWS * 3, indent=1).encode(),
    "r.csv": 'prompt,completion\n"a,b",1\n"say ""é""",2\n'.encode(),
}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(sorted(WHOLE)),
    at=st.floats(0, 1, exclude_max=True),
    gone=st.integers(0, 40),
    new=st.binary(max_size=20),
    cut=st.booleans(),
)
def test_a_damaged_file_is_read_or_named(tmp_path, name, at, gone, new, cut):
    whole = WHOLE[name]
    start = int(at * len(whole))
    damaged = whole[:start] + new + (b"" if cut else whole[start + gone :])
    path = written(tmp_path, name, damaged)
    try:
        rows, problem = list(read_rows(path)), None
    except ValueError as error:
        rows, problem = [], str(error)
    assert rows or (str(path) in problem and "\n" not in problem)


def test_every_ending_is_a_local_file_wherever_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pa.Table.from_pylist(ROWS)
    for ending in DATA_ENDINGS:
        path = tmp_path / f"rows{ending}"
        text = {".json": json.dumps(ROWS), ".csv": "prompt,completion\na,b\n", ".tsv": "prompt\tcompletion\na\tb\n"}
        pq.write_table(table, path) if ending == ".parquet" else path.write_text(text.get(ending, lines(ROWS)))
        assert load_rows(path.name)["train"].column_names == ["prompt", "completion"]
        path.unlink()
        assert not is_repo_id(f"owner/{path.name}")
        with pytest.raises(ValueError, match=f"rows{ending} does not exist"):
            load_rows(path.name)


def test_folders_and_other_files(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(test=rows).save_to_disk(tmp_path / "splits")
    assert list(load_rows(str(tmp_path / "one"))["train"]) == ROWS
    assert list(load_rows(str(tmp_path / "splits"), split="test")) == ROWS
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none' is neither a local file nor .* doesn't contain any data files"):
        load_rows(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"rows\.txt should end with one of \.json"):
        load_rows(str(written(tmp_path, "rows.txt", "a")))


# What `datasets` would make of a column of its own accord: numbers, nothing, dates, values moved to another column.
GUESSED = {
    "train.csv": "prompt,completion\n1+1,2\n1+2,007\n",
    "train.tsv": "prompt\tcompletion\nNamibia\tNA\nnothing\tNone\n",
    "train-00000-of-00001.jsonl": lines([{"prompt": "2024-01-01", "completion": "2024-01-02T10:00:00"}] * 2),
    "train.json": json.dumps([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x2", "completion": "True"}]),
}


@pytest.mark.parametrize("name", GUESSED)
def test_a_folder_gives_the_rows_that_its_files_give(tmp_path, name):
    """Each file exactly as by itself, whatever columns and types the others have; splits by the files' names."""
    folder = tmp_path / "rows"
    folder.mkdir()
    alone = [list(read_rows(written(folder, n, GUESSED[name]))) for n in (name, name.replace("train", "test"))]
    found = load_rows(str(folder))
    assert list(found) == ["train", "test"]
    assert [list(found[split]) for split in found] == alone
    assert list(load_rows(str(folder), split="test")) == alone[1]
    other = '{"messages": [{"role": "user", "content": "Hi"}], "id": [1]}'
    if name.endswith("json"):
        written(folder, "train2.json", other)
        assert [{k: v for k, v in row.items() if v is not None} for row in load_rows(str(folder))["train"]] == [
            *({k: v for k, v in row.items() if v is not None} for row in alone[0]),
            json.loads(other),
        ]
    written(folder, name, GUESSED[name] + "{a\tb,c\td,e")
    with pytest.raises(ValueError, match=rf"{name}, line \d: "):
        load_rows(str(folder))


def test_a_folder_that_says_how_its_files_are_read_is_believed(tmp_path):
    written(tmp_path, "README.md", "---\nconfigs:\n- config_name: x\n  data_files: a.csv\n  sep: ';'\n---\n")
    written(tmp_path, "a.csv", "prompt;completion\na;b\n")
    assert list(load_rows(str(tmp_path), "x")["train"]) == [{"prompt": "a", "completion": "b"}]


def test_an_empty_cell_is_no_text(tmp_path):
    """NaN is how tables write one: never the answer "NaN"."""
    read = read_rows(
        written(tmp_path, "r.jsonl", '{"prompt": "a", "completion": NaN}\n{"prompt": "b", "completion": "c"}')
    )
    assert read["completion"] == [None, "c"]


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl does not exist"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_rows(tmp_path)
