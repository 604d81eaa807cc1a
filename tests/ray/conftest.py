"""A corpus, a checkpoint with reference vectors, and Ray, started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gem_st import hub
from gem_st.ray.cluster import ENVIRONMENT

from ..conftest import CORPUS


@pytest.fixture
def checkpoint(make_model, tmp_path) -> str:
    """A model beside a frozen base, with a prompt for documents, exported."""
    model = make_model(freeze_base=True, num_gem_tokens=2)
    model.prompts = {"query": "Question: ", "document": "Text: "}
    return str(hub.export(model, tmp_path / "checkpoint"))


def make_texts(num: int) -> list[str]:
    """Texts of one to eight sentences, all different."""
    return [f"{index}. " + " ".join(CORPUS[: 1 + index % 8]) for index in range(num)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """320 texts in row groups of 16, with an id and a column more."""
    path = tmp_path / "corpus.parquet"
    texts = make_texts(320)
    ids = [f"doc-{index:04}" for index in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": texts, "year": list(range(len(texts)))}), path, row_group_size=16)
    return path


@pytest.fixture(autouse=True)
def _the_process_stays_as_it_was() -> Iterator[None]:
    """A run in this process sets threads and environment as if it was its own."""
    num_threads = torch.get_num_threads()
    with patch.dict(os.environ):
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def started_ray() -> Iterator[object]:
    """Ray on this machine, for the tests that need it in this process, and room for one actor."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with patch.dict(os.environ, ENVIRONMENT):
        ray.init(address="local", num_cpus=4, object_store_memory=2**28, **options)
    yield ray
    ray.shutdown()
