"""Shared by all tests: no network, one thread, quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging

import pytest
import torch
from datasets import Dataset
from operators import build, share_folder
from tiny import tiny_model, tiny_rows, tiny_tokenizer

torch.set_num_threads(1)
share_folder()
gc.disable()  # until all tests are collected: what is imported is no garbage


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_not_searched():
    """Every training ends with a full garbage collection (accelerate), which takes 0.7 s while it looks through all
    that the imported libraries consist of: leave out what was there before the file's first test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_log_level():
    """A recipe that ran in this process has raised the package's log level: back to the default."""
    yield
    logging.getLogger("gkd").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def operators():
    """DeepSpeed's C++ operators, built before anything is timed."""
    build()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def student():
    return tiny_model(seed=1)


@pytest.fixture
def teacher():
    return tiny_model(hidden=48, layers=3, seed=2)


@pytest.fixture
def rows():
    return Dataset.from_list(tiny_rows(16))
