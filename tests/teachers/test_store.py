"""The store of hidden states: exact, whole or not there, never stale, never in the way."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from disks import small_disk
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gkd.common.errors import DiskFullError
from gkd.loss.signals import Head
from gkd.teachers import store as score_store
from gkd.teachers.store import ScoreStore, open_scores, row_key

ROOT = Path(__file__).resolve().parents[2]
KEYS = [row_key([i, i + 1, 7], [-100, i + 1, 7]) for i in range(6)]


def states(number=6, dtype=torch.float32, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {KEYS[i]: torch.randn(2 * i + 1, width, generator=draw).to(dtype) for i in range(number)}


def shards(store):
    return sorted(store.path.glob("rows-*.safetensors"))


def filled(folder, rows=None, key=None):
    store = open_scores(folder, key or {"model": "a"})
    store.add(states() if rows is None else rows)
    store.flush()
    return store


# ----------------------------------------------------------------------------------------------------- keys, values


def test_a_key_is_of_the_ids_and_of_which_are_targets():
    ids, labels = [5, 6, 7, 8], [-100, -100, 7, 8]
    assert row_key(ids, labels) == row_key(list(ids), [-100, -100, 7, 8])
    others = [
        row_key([5, 6, 7, 9], [-100, -100, 7, 9]),
        row_key(ids, [-100, -100, -100, 8]),
        row_key(ids, [-100, -100, 7, -100]),
        row_key(ids[:3], labels[:3]),
        row_key([*ids, 2], [*labels, -100]),  # 2 is a token here, and a target's place in `ids`
        row_key([4, *ids], [-100, *labels]),
    ]
    assert len({row_key(ids, labels), *others}) == 7
    assert row_key(ids, [5, -100, 7, 8]) == row_key(ids, labels)  # nothing predicts the first token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_come_back_bit_for_bit_before_and_after_they_are_on_disk(tmp_path, dtype):
    rows = states(dtype=dtype)
    store = open_scores(tmp_path, {"model": "a"})
    store.add(rows)
    assert shards(store) == []
    for again in (store, None):
        if again is None:
            store.flush()
            again = open_scores(tmp_path, {"model": "a"})
        assert len(again) == 6
        for key, row in rows.items():
            kept = again.get(key)
            assert kept.dtype == dtype
            assert torch.equal(kept, row)
        assert again.get(row_key([1], [-100])) is None
    (shard,) = shards(store)
    tokens = sum(len(row) for row in rows.values())
    with safe_open(shard, "pt") as file:
        assert file.get_slice("hidden").get_shape() == [tokens, 8]
    index = 6 * (16 + 8 + 8)
    assert shard.stat().st_size < tokens * 8 * dtype.itemsize + index + 1000  # 2 x Dt bytes a token in bf16


def test_what_is_kept_does_not_change_with_the_tensor_it_came_from(tmp_path):
    row = torch.ones(3, 4)
    store = open_scores(tmp_path, {})
    store.add({KEYS[0]: row})
    row.zero_()
    assert torch.equal(store.get(KEYS[0]), torch.ones(3, 4))


def test_the_first_states_of_a_row_stay(tmp_path):
    store = filled(tmp_path)
    store.add(states(seed=1))
    store.flush()
    assert torch.equal(store.get(KEYS[2]), states()[KEYS[2]])
    assert len(shards(store)) == 1


def test_memory_is_bounded_and_one_call_is_one_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(score_store, "SHARD_BYTES", 3000)
    store = open_scores(tmp_path, {})
    for i in range(30):
        store.add({row_key([i, j], [-100, j]): torch.full((4, 8), float(i)) for j in range(4)})  # 512 bytes a call
        assert store._pending_bytes < 3000
    store.flush()
    assert len(shards(store)) == 5
    for shard in shards(store):
        values, counts = load_file(shard)["hidden"][:, 0].unique(return_counts=True)
        assert set(counts.tolist()) == {16}, values


def test_what_waits_too_long_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(score_store, "SHARD_SECONDS", 0.05)
    store = open_scores(tmp_path, {})
    store.add(states(1))
    time.sleep(0.1)
    store.add(states(2))
    assert len(shards(store)) == 1
    assert store._pending_bytes == 0


def test_another_key_is_another_store(tmp_path):
    filled(tmp_path)
    assert len(open_scores(tmp_path, {"model": "a"})) == 6
    assert len(open_scores(tmp_path, {"model": "b"})) == 0
    about = json.loads((open_scores(tmp_path, {"model": "b"}).path / "about.json").read_text())
    assert about["key"] == {"model": "b"}


def test_a_shard_of_another_store_is_not_read(tmp_path):
    """Somebody has copied files between folders: their rows have the same keys, and come from another teacher."""
    (shard,) = shards(filled(tmp_path))
    other = open_scores(tmp_path, {"model": "b"})
    (other.path / shard.name).write_bytes(shard.read_bytes())
    other.refresh()
    assert len(other) == 0


def test_others_rows_are_seen_after_a_refresh(tmp_path):
    mine, theirs = open_scores(tmp_path, {}), open_scores(tmp_path, {})
    theirs.add(states(3))
    theirs.flush()
    assert mine.get(KEYS[1]) is None
    mine.refresh()
    assert torch.equal(mine.get(KEYS[1]), states()[KEYS[1]])


def test_more_shards_than_are_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(score_store, "_OPEN", 2)
    store = open_scores(tmp_path, {})
    for key, row in states().items():
        store.add({key: row})
        store.flush()
    for _ in range(2):
        assert all(torch.equal(store.get(key), row) for key, row in states().items())
    assert len(store._mapped) == 2


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("cut", [1, 7, 100, -1, -300])
def test_a_shard_that_is_cut_off_is_told_deleted_and_written_anew(tmp_path, caplog, cut):
    (shard,) = shards(filled(tmp_path))
    content = shard.read_bytes()
    shard.write_bytes(content[:cut])
    store = open_scores(tmp_path, {"model": "a"})
    assert len(store) == 0
    assert "damaged" in caplog.text
    assert shard.name in caplog.text
    assert not shard.exists()
    store.add(states())
    store.flush()
    assert all(torch.equal(open_scores(tmp_path, {"model": "a"}).get(key), row) for key, row in states().items())


def test_a_flipped_bit_anywhere_is_found(tmp_path, caplog):
    content = shards(filled(tmp_path))[0].read_bytes()
    size = len(content)
    places, found = [*range(8, 60, 9), *range(60, size, 37), size - 1], 0
    for place in places:
        folder = tmp_path / str(place)
        store = filled(folder)
        (shard,) = shards(store)
        changed = bytearray(shard.read_bytes())
        changed[place] ^= 1
        shard.write_bytes(changed)
        caplog.clear()
        again = open_scores(folder, {"model": "a"})
        for key, row in states().items():
            kept = again.get(key)
            assert kept is None or torch.equal(kept, row), place
        found += "damaged" in caplog.text
    assert found > 0.9 * len(places)  # others fell on blanks
    # a bit of the states themselves, of which the list of rows knows nothing
    store = filled(tmp_path / "states")
    (shard,) = shards(store)
    tensors = load_file(shard)
    with safe_open(shard, "pt") as file:
        about = file.metadata()
    tensors["hidden"][5, 3] += 1e-6
    save_file(tensors, shard, metadata=about)
    again = open_scores(tmp_path / "states", {"model": "a"})
    assert len(again) == 6
    assert [again.get(key) is None for key in KEYS[:4]] == [False, False, True, True]  # rows of 1, 3, 5 tokens
    assert "checksum" in caplog.text
    assert not shard.exists()


def test_a_shard_that_vanishes_is_not_there_any_more(tmp_path):
    filled(tmp_path)
    store = open_scores(tmp_path, {"model": "a"})
    shards(store)[0].unlink()
    assert store.get(KEYS[0]) is None
    assert KEYS[1] not in store


def test_a_pickle_in_the_folder_is_not_read(tmp_path):
    store = filled(tmp_path)
    torch.save(states(), store.path / "rows-x.safetensors")
    assert len(open_scores(tmp_path, {"model": "a"})) == 6


WRITER = """
import sys, torch
from gkd.teachers import store as score_store
from gkd.teachers.store import open_scores, row_key
score_store.SHARD_BYTES = 40_000
store = open_scores(sys.argv[1], {"model": "a"})
for i in range(100_000):
    store.add({row_key([i], [-100]): torch.full((100, 40), float(i))})
    if i % 10 == 0:
        print(i, flush=True)
"""


def test_what_a_killed_process_had_written_is_there_and_whole(tmp_path, caplog):
    for kill_at in (40, 90, 130):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if int(line) >= kill_at:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        store = open_scores(tmp_path, {"model": "a"})
        rows = {i: store.get(row_key([i], [-100])) for i in range(kill_at - 5)}
        assert all(torch.equal(row, torch.full((100, 40), float(i))) for i, row in rows.items())
    assert "damaged" not in caplog.text


def test_what_a_killed_process_left_half_written_goes_in_the_end(tmp_path):
    store = filled(tmp_path)
    for name, age in ((".old.tmp", 3 * 24 * 3600), (".new.tmp", 60)):
        (store.path / name).write_bytes(b"x" * 100)
        os.utime(store.path / name, (time.time() - age,) * 2)
    assert len(open_scores(tmp_path, {"model": "a"})) == 6
    assert [path.name for path in store.path.glob(".*.tmp")] == [".new.tmp"]  # its writer may be at it


# -------------------------------------------------------------------------------------------------------- full, locked


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(score_store, "ROOM", 0)
    disk = tmp_path / "disk"
    if not small_disk(disk, "1m"):
        pytest.skip("mounting needs rights that this process does not have")
    try:
        store = open_scores(disk, {"model": "a"})
        store.add(states())
        store.flush()
        free = os.statvfs(disk)
        (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - 40 * 1024))
        store.add({row_key([9], [-100]): torch.zeros(40, 255)})  # fits by the count, not with what comes with it
        with pytest.raises(DiskFullError, match=r"disk is full.*teacher_scores_dir") as error:
            store.flush()
        assert str(disk) in str(error.value)
        assert list(store.path.glob(".*.tmp")) == []
        assert torch.equal(store.get(KEYS[3]), states()[KEYS[3]])
        (disk / "other").unlink()
        again = open_scores(disk, {"model": "a"})
        assert len(again) == 6
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # shards may still be mapped


def test_some_room_is_left_for_checkpoints(tmp_path, monkeypatch):
    store = open_scores(tmp_path, {})
    monkeypatch.setattr(score_store, "ROOM", 1 << 60)
    store.add(states())
    with pytest.raises(DiskFullError, match=r"stay so.*make room"):
        store.flush()
    assert shards(store) == []


@pytest.mark.parametrize("during", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, during):
    store = open_scores(tmp_path, {})
    store.add(states())

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, during, refuse)
        with pytest.raises(DiskFullError):
            store.flush()
    assert sorted(path.name for path in store.path.iterdir()) == ["about.json"]
    store.add(states())
    store.flush()
    assert len(open_scores(tmp_path, {})) == 6


def test_a_read_only_folder_is_read(tmp_path, caplog):
    folder = tmp_path / "scores"
    filled(folder)
    mounted = ["mount", "--bind", str(folder), str(folder)], ["mount", "-o", "remount,ro,bind", str(folder)]
    if any(subprocess.run(command, capture_output=True).returncode for command in mounted):
        pytest.skip("mounting needs rights that this process does not have")
    try:
        store = open_scores(folder, {"model": "a"})
        assert not store.writable
        assert "cannot be written to" in caplog.text
        store.add({row_key([9], [-100]): torch.zeros(2, 8)})
        store.flush()
        assert len(store) == 6
        assert torch.equal(store.get(KEYS[4]), states()[KEYS[4]])
        with pytest.raises(ValueError, match=r"teacher_scores_dir='.*' cannot be made or read"):
            open_scores(folder, {"model": "b"})
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="teacher_scores_dir"):
        open_scores(tmp_path / "file" / "scores", {})


# ---------------------------------------------------------------------------------------------------------- the head


def heads():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 8, generator=draw)
    return [
        Head(weight),
        Head(weight.bfloat16(), torch.randn(11, generator=draw).bfloat16(), 0.7, 30.0),
        Head(weight.t().contiguous().t(), softcap=5.0),
    ]


def test_a_head_comes_back_as_it_was(tmp_path, caplog):
    for i, head in enumerate(heads()):
        store = open_scores(tmp_path / str(i), {})
        assert store.read_head() is None
        store.write_head(head)
        again = open_scores(tmp_path / str(i), {}).read_head()
        assert torch.equal(again.weight, head.weight)
        assert (again.weight.dtype, again.logit_scale, again.softcap) == (
            head.weight.dtype, head.logit_scale, head.softcap,
        )  # fmt: skip
        assert (again.bias is None) == (head.bias is None)
        assert again.bias is None or torch.equal(again.bias, head.bias)
        assert len(open_scores(tmp_path / str(i), {})) == 0  # it is not taken for rows
    assert caplog.text == ""
    path = store.path / "head.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-3] ^= 1
    path.write_bytes(changed)
    caplog.set_level(logging.WARNING)
    assert store.read_head() is None
    assert "damaged" in caplog.text
    assert ScoreStore(store.path, "another").read_head() is None
