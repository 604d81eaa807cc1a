"""A pytest plugin for Sentence Transformers' own tests: another model in place of the one that their fixture loads.

    pytest -p in_place_of_the_fixture ...    # with NEIGHBOUR=FOLDER of the model

run.py makes the models and runs this.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel

FIXTURE = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
load = BaseModel.__init__


@wraps(load)
def load_other(self: Any, model_name_or_path: str | None = None, *args: Any, **kwargs: Any) -> None:
    if model_name_or_path == FIXTURE and isinstance(self, SentenceTransformer):
        model_name_or_path, kwargs["trust_remote_code"] = os.environ["NEIGHBOUR"], True
    load(self, model_name_or_path, *args, **kwargs)


BaseModel.__init__ = load_other
