"""Large files: the same rows and the same errors as small ones, on disk, read once."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gkd.data import files, large_files
from gkd.data.files import read_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
PLAIN = [
    {"messages": CHAT, "n": 1, "x": 0.5, "ok": True, "tags": ["a", "b"]},
    {"messages": CHAT[:1], "n": None, "x": 2, "ok": None, "tags": []},
]
EXACT = {
    "dates, which Arrow would make of these": [{"prompt": "2020-01-01"}, {"prompt": "2021-05-06T00:00:00"}],
    "more digits than a float has": [{"prompt": "a", "id": 2**80}, {"prompt": "b", "id": 1}],
    "whole numbers as far as a float goes": [{"id": 2**60 + 1}, {"id": 0.5}],
    "turns of different keys": [{"messages": [*CHAT, {"role": "user", "content": "x", "name": "y"}]}],
    "a turn without content": [{"messages": [{"role": "user", "content": None}]}, {"messages": CHAT}],
    "a column of two kinds": [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x2"}],
    "tools": [{"tools": [{"a": 1, "b": 1}]}, {"tools": [{"b": 1, "a": 1}]}],
}
BROKEN = {
    "r.jsonl": [
        '{"prompt": "a"}\n\n{"prompt": "b"\n',
        '{"prompt": "a"}\n["b"]\n',
        '[{"prompt": "a"}]\n',
        '{"prompt": ["\\ud800"]}',
        '{"prompt": "a"}\n{"prompt": ["\\ud800"]}\n',
        "\n",
    ],
    "r.csv": ["prompt,completion\na,b\na,b,c\n"],
    "r.json": ['[{"prompt": "a"},\n {"prompt" "b"}]'],
    "r.parquet": ["x"],
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def all_large(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(files, "LARGE", 0)
    return tmp_path


def test_what_arrow_can_hold_is_read_by_datasets_and_once(all_large, monkeypatch):
    path = all_large / "rows.jsonl"
    path.write_text("\ufeff" + lines(PLAIN), encoding="utf-8")
    monkeypatch.setattr(files, "_tables", lambda path: pytest.fail("the exact reader is not needed"))
    rows = read_rows(path)
    assert list(rows) == PLAIN
    assert [file["filename"].endswith(".arrow") for file in rows.cache_files] == [True]  # memory-mapped
    before = {file: file.stat().st_mtime_ns for file in (all_large / "cache").rglob("*.arrow")}
    assert list(read_rows(path)) == PLAIN
    assert {file: file.stat().st_mtime_ns for file in (all_large / "cache").rglob("*.arrow")} == before
    path.write_text(lines(PLAIN[::-1]))
    assert list(read_rows(path)) == PLAIN[::-1]


@pytest.mark.parametrize("rows", EXACT.values(), ids=EXACT.keys())
def test_what_arrow_would_change_is_read_exactly(all_large, rows, monkeypatch):
    path = all_large / "rows.jsonl"
    path.write_text(lines(rows))
    large = read_rows(path)
    monkeypatch.setattr(files, "LARGE", 2**20)
    small = read_rows(path)
    assert json.dumps(list(large)) == json.dumps(list(small))
    assert large.features == small.features
    assert len(large.cache_files) == 1


def test_other_kinds_are_kept_in_the_cache_too(all_large, monkeypatch):
    (all_large / "rows.json").write_text(json.dumps({"data": PLAIN}))
    (all_large / "rows.csv").write_text("prompt,completion\n1,2020-01-01\n,x\n")
    pq.write_table(pa.Table.from_pylist(PLAIN), all_large / "rows.parquet", row_group_size=1)
    expected = [PLAIN, [{"prompt": "1", "completion": "2020-01-01"}, {"prompt": "", "completion": "x"}], PLAIN]
    paths = [all_large / f"rows.{ending}" for ending in ("json", "csv", "parquet")]
    assert [list(read_rows(path)) for path in paths] == expected
    monkeypatch.setattr(files, "_tables", lambda path: pytest.fail("it has been read"))
    again = [read_rows(path) for path in paths]
    assert [list(rows) for rows in again] == expected
    assert all(rows.cache_files for rows in again)
    os.utime(paths[0], ns=(1, 1))  # the file has been written to
    with pytest.raises(pytest.fail.Exception):
        read_rows(paths[0])


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_as_in_a_small_file(all_large, name, monkeypatch, caplog):
    for text in BROKEN[name]:
        (all_large / name).write_text(text)
        monkeypatch.setattr(files, "LARGE", 0)
        with pytest.raises(ValueError, match=name) as large:
            read_rows(all_large / name)
        monkeypatch.setattr(files, "LARGE", 2**20)
        with pytest.raises(ValueError, match=name) as small:
            read_rows(all_large / name)
        assert str(large.value) == str(small.value)
    assert "Failed to load JSON" not in caplog.text
    left = (all_large / "cache" / large_files._KEPT).glob("*")
    assert all(path.suffix == ".arrow" for path in left)  # nothing half written
