"""Which commit of a repository a model came from, read off a cache that has the Hub's layout."""

import pytest
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from gkd.models.facts import revision_of
from gkd.models.loading import base_name

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A repository me/tiny with one commit, `main`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--tiny"
    tiny_model().save_pretrained(repo / "snapshots" / FIRST)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(FIRST)
    return tmp_path


def load(cache, **options):
    return AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=str(cache), local_files_only=True, **options)


def test_the_commit_of_a_model_from_the_hub(hub_cache):
    assert revision_of(load(hub_cache)) == FIRST
    assert revision_of(load(hub_cache), {"dtype": "float32"}) == FIRST


def test_of_two_commits_only_the_one_that_was_asked_for_is_named(hub_cache):
    tiny_model().save_pretrained(hub_cache / "models--me--tiny" / "snapshots" / SECOND)
    assert revision_of(load(hub_cache, revision=SECOND), {"revision": SECOND}) == SECOND
    assert revision_of(load(hub_cache)) is None


def test_folders_and_models_in_memory_have_none(hub_cache, tmp_path):
    assert revision_of(tiny_model()) is None
    tiny_model().save_pretrained(tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert revision_of(model) is None
    model.config._name_or_path = "/a/folder/that/is/gone"
    assert revision_of(model) is None


def test_an_adapter_on_the_hub_is_told_from_a_model(hub_cache, tmp_path):
    folder = hub_cache / "models--me--adapter" / "snapshots" / FIRST
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/tiny", "r": 4}')
    (hub_cache / "models--me--adapter" / "refs").mkdir()
    (hub_cache / "models--me--adapter" / "refs" / "main").write_text(FIRST)
    assert base_name("me/adapter") == "me/tiny"
    for whole in ("me/tiny", "me/nowhere", str(tmp_path), "/gone/folder"):
        assert base_name(whole) == whole
    tiny_model().save_pretrained(folder)  # whole weights beside it: the model counts
    assert base_name(str(folder)) == str(folder)
