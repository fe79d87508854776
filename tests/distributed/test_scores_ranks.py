"""Two ranks share the teacher's hidden states, and its answers: DDP, and ZeRO-3, where all of them run the teacher or
none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import HERE, execute

pytestmark = pytest.mark.distributed
SCENES = ["runs", "under_zero3"]


@pytest.fixture(scope="module")
def results(operators: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each scene of scores_worker.py came to."""
    folder = tmp_path_factory.mktemp("scores")
    scenes = [*SCENES, "answers"]
    execute([str(HERE / "scores_worker.py"), str(folder), *scenes])
    return {scene: json.loads((folder / scene / "result.json").read_text()) for scene in scenes}


@pytest.mark.parametrize("scene", SCENES)
def test_ranks_share_scores_and_train_as_with_the_live_teacher(results: dict[str, Any], scene: str) -> None:
    result = results[scene]
    live, filled, mixed = result["live"], result["filled"], result["mixed"]
    assert len(live[0]["losses"]) == 8
    assert [rank["scored"] for rank in live] == [16, 16]
    assert filled[0]["losses"] == pytest.approx(live[0]["losses"], rel=1e-4)
    assert [rank["loaded"] for rank in filled] == [False, False]
    assert [rank["scored"] for rank in filled] == [0, 0]
    assert mixed[0]["losses"] == pytest.approx(result["mixed_live"][0]["losses"], rel=1e-4)
    assert all(rank["loaded"] for rank in mixed)
    if scene == "under_zero3":
        # 16 rows, three to a rank: one row to see how large it is, then three calls; the last is one rank's only
        assert result["precomputed"] == [4, 4]
        assert mixed[0]["calls"] == mixed[1]["calls"]
    else:
        # each row once, by the rank that meets it first, although the epochs deal the rows out anew
        assert sum(rank["scored"] for rank in result["filling"]) == 16
        assert result["filling"][0]["losses"] == pytest.approx(live[0]["losses"], rel=1e-4)
        assert sum(rank["scored"] for rank in mixed) < sum(rank["scored"] for rank in result["mixed_live"])
    assert result["stores"] == [1, 1]  # split up or whole, it is one teacher


def test_sharded_ranks_share_the_work_and_write_what_one_process_writes(results: dict[str, Any]) -> None:
    """`gkd precompute` on two ranks under ZeRO-3: the same answers as one process gives, and one fingerprint."""
    two, one = results["answers"]["two"], results["answers"]["one"]
    assert two["table"] == one["table"]
    assert len(two["table"]) == 9
    assert two["stores"] == one["stores"]  # a folder of the same name: the sharded teacher has the whole's fingerprint
    assert list(two["stores"].values()) == [9]
