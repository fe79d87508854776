"""Local data files: every kind gives the same rows; what is broken is named with its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gkd.data import read_rows

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
        ("r.jsonl", '{"prompt": "a"}\n{"prompt": [1]}\n', "different types in column 'prompt'"),
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


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl does not exist"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_rows(tmp_path)
