"""Caches that several users share, and things in their folders that are no cache files."""

import json
import logging
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from forked import Child
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gkd.loss.signals import Head
from gkd.rollouts.store import open_store
from gkd.teachers.store import open_scores, row_key

KEY = {"model": "a"}
ROW = row_key([1, 2, 3], [-100, 2, 3])


@pytest.fixture
def shared():
    """A folder that everybody can reach; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def as_another_user(work, tmp_path):
    """What `work` returns in a process that does not own the files."""

    def child(say):
        logging.getLogger().addHandler(logging.StreamHandler(os.fdopen(os.dup(2), "w")))
        if os.geteuid() == 0:
            os.setuid(65534)
        say(json.dumps(work()))

    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    process = Child(child, tmp_path / "errors")
    line = process.wait_for()
    assert line is not None, (tmp_path / "errors").read_text()
    return json.loads(line), (tmp_path / "errors").read_text()


def test_sequences_of_another_user_are_read_and_new_ones_kept_for_the_run(shared, tmp_path):
    open_store(shared, KEY).add([([1, 2], [3, 4])])

    def work():
        store = open_store(shared, KEY)
        store.add([([5], [6]), ([1, 2], [9])])
        store.add([([7], [8])])
        return [store.get([1, 2]), store.get([5]), store.get([7]), len(store), [7] in store, [8] in store]

    for folder in shared.iterdir():
        folder.chmod(0o755)
    (found, said) = as_another_user(work, tmp_path)
    assert found == [[3, 4], [6], [8], 3, True, False]
    assert said.count("cannot be written to") == 1
    assert len(open_store(shared, KEY)) == 1


def test_sequences_that_another_user_has_closed_are_made_again(shared, tmp_path):
    store = open_store(shared, KEY)
    store.add([([1, 2], [3, 4])])
    store.path.chmod(0o777)
    (file,) = store.path.glob("*.jsonl")
    file.chmod(0o600)

    def work():
        store = open_store(shared, KEY)
        store.refresh()
        before = [1, 2] in store
        store.add([([1, 2], [3, 5])])
        return [before, store.get([1, 2])]

    found, said = as_another_user(work, tmp_path)
    assert found == [False, [3, 5]]
    assert said.count("cannot be read (Permission denied)") == 1
    assert file.exists()


def test_scores_can_be_read_by_whom_the_umask_allows(shared, tmp_path):
    store = open_scores(shared, KEY)
    store.add({ROW: torch.ones(2, 4)})
    store.flush()
    store.write_head(Head(torch.ones(5, 4)))
    found, _ = as_another_user(
        lambda: [ROW in open_scores(shared, KEY), open_scores(shared, KEY).has_head()], tmp_path
    )
    assert found == [True, True]


def test_scores_that_another_user_has_closed_are_told_and_left_alone(shared, tmp_path):
    store = open_scores(shared, KEY)
    store.add({ROW: torch.ones(2, 4)})
    store.flush()
    store.path.chmod(0o777)
    (file,) = store.path.glob("rows-*")
    file.chmod(0o600)
    found, said = as_another_user(lambda: ROW in open_scores(shared, KEY), tmp_path)
    assert found is False
    assert "cannot be read (Permission denied)" in said
    assert file.exists()


@pytest.mark.parametrize("opened", [open_store, open_scores])
def test_a_folder_that_another_user_has_closed_is_no_empty_cache(shared, tmp_path, opened):
    opened(shared, KEY).path.chmod(0o700)

    def work():
        with pytest.raises(ValueError, match=r"cannot be made or read .Permission denied.") as error:
            opened(shared, KEY)
        return str(error.value)

    assert "teacher_" in as_another_user(work, tmp_path)[0]


def test_a_sequence_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"teacher_cache_dir=.* cannot be made"):
        open_store(tmp_path / "file" / "cache", KEY)


def special(folder, name):
    """A folder, a pipe, a link to nowhere and one to itself, each called like a file of the cache."""
    (folder / name("folder")).mkdir()
    os.mkfifo(folder / name("pipe"))
    (folder / name("nowhere")).symlink_to(folder / "nothing")
    (folder / name("self")).symlink_to(folder / name("self"))


def test_special_files_in_a_sequence_folder_hold_nothing_and_nobody_waits_for_them(tmp_path):
    store = open_store(tmp_path, KEY)
    store.add([([1], [2])])
    special(store.path, "x-{}.jsonl".format)
    again = open_store(tmp_path, KEY)
    again.refresh()
    assert (len(again), again.get([1])) == (1, [2])


def test_special_files_in_a_score_folder_hold_nothing_and_nobody_waits_for_them(tmp_path):
    store = open_scores(tmp_path, KEY)
    store.add({ROW: torch.ones(2, 4)})
    store.flush()
    special(store.path, "rows-{}.safetensors".format)
    os.mkfifo(store.path / "head.safetensors")
    again = open_scores(tmp_path, KEY)
    assert torch.equal(again.get(ROW), torch.ones(2, 4))
    assert again.read_head() is None
    again.write_head(Head(torch.ones(5, 4)))
    assert torch.equal(again.read_head().weight, torch.ones(5, 4))


@pytest.mark.parametrize("ids", [[-1], [True], [1.0], ["1"], [None], [[1]], [1 << 70], {"0": 1}, "12", None])
def test_a_record_whose_ids_are_none_is_left_out_though_its_sum_is_right(tmp_path, caplog, ids):
    store = open_store(tmp_path, KEY)
    store.add([([1], [2]), ([3], [4])])
    (file,) = store.path.glob("*.jsonl")
    first, second = file.read_text().splitlines()
    record = json.loads(first) | {"ids": ids}
    record["sum"] = zlib.crc32(f"{record['key']} {ids}".encode())
    file.write_text(json.dumps(record) + "\n" + second + "\n" + "[" * 100_000 + "\n")
    again = open_store(tmp_path, KEY)
    assert [[1] in again, [3] in again] == [False, True]
    assert "line 1 does not match" in caplog.text


@pytest.mark.parametrize(
    "numbers",
    [
        '{"logit_scale": 1.0}',
        '{"logit_scble": 1.0, "softcap": null}',
        "[]",
        "3",
        "x",
        '{"logit_scale": 2.0, "softcap": null}',
    ],
)
def test_a_head_with_other_numbers_is_written_anew(tmp_path, caplog, numbers):
    store = open_scores(tmp_path, KEY)
    store.write_head(Head(torch.ones(5, 4)))
    path = store.path / "head.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path), path, metadata=about | {"numbers": numbers})
    assert store.read_head() is None
    assert "is damaged" in caplog.text


def test_states_of_another_dtype_with_the_same_bytes_are_found(tmp_path, caplog):
    store = open_scores(tmp_path, KEY)
    store.add({ROW: torch.ones(2, 4, dtype=torch.bfloat16)})
    store.flush()
    (path,) = store.path.glob("rows-*")
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"F16" '))
    assert ROW not in open_scores(tmp_path, KEY)
    assert "another form" in caplog.text
