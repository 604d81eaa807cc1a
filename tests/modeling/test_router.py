"""A GEM module inside a Router is saved as one that stands alone: it loads where gem_st is not installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

from gem_st import GemTransformer

from ..conftest import CORPUS, quiet_arguments

LOAD = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, task, target = sys.argv[1:]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
np.save(target, model.encode(json.load(open(target + ".json")), **({"task": task} if task else {})))
"""


@pytest.fixture
def encode_without_gem_st(run_without_gem_st, tmp_path):
    def encode(folder, task: str | None) -> np.ndarray:
        (tmp_path / "vectors.npy.json").write_text(json.dumps(CORPUS))
        run_without_gem_st(LOAD, folder, task or "", tmp_path / "vectors.npy")
        return np.load(tmp_path / "vectors.npy")

    return encode


def two_modules(base: str) -> Router:
    query = GemTransformer(base, num_gem_tokens=2)
    return Router.for_query_document(query_modules=[query], document_modules=[GemTransformer(base)])


def frozen(base: str) -> Router:
    gem = GemTransformer(base, num_gem_tokens=2, freeze_base=True)
    return Router({"query": [gem, Dense(32, 16)], "document": [gem, Normalize()]})


@pytest.mark.parametrize("make", [two_modules, frozen])
@pytest.mark.parametrize("task", ["query", "document"])
def test_routed_modules_load_where_gem_st_is_not_installed(make_base, tmp_path, encode_without_gem_st, make, task):
    model = SentenceTransformer(modules=[make(str(make_base()))], device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    expected = model.encode(CORPUS, task=task)
    np.testing.assert_allclose(encode_without_gem_st(tmp_path / "saved", task), expected, atol=1e-6)
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(CORPUS, task=task), expected, atol=1e-6)
    code = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("gem_*.py")}
    assert "gem_st.py" in code
    assert all("/" not in name for name in code)
    config = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert config["requirements"].keys() == {"sentence-transformers", "transformers", "torch"}


def test_so_does_a_checkpoint_of_a_trainer(make_base, tmp_path, encode_without_gem_st):
    gem = GemTransformer(str(make_base()))
    router = Router({"query": [gem, Normalize()], "document": [gem]}, default_route="query")
    routed = SentenceTransformer(modules=[router], device="cpu")
    trainer = SentenceTransformerTrainer(
        model=routed,
        args=quiet_arguments(
            tmp_path / "run",
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=4,
            router_mapping={"anchor": "query", "positive": "document"},
        ),
        train_dataset=Dataset.from_dict({"anchor": CORPUS, "positive": CORPUS[::-1]}),
        loss=MultipleNegativesRankingLoss(routed),
    )
    trainer.train()
    vectors = encode_without_gem_st(tmp_path / "run" / "checkpoint-2", "query")
    np.testing.assert_allclose(vectors, routed.encode(CORPUS, task="query"), atol=1e-6)
    assert not list((tmp_path / "run").glob("*.py"))


def test_a_folder_that_only_lies_in_another_checkpoint_keeps_its_code(make_model, tmp_path, encode_without_gem_st):
    model = make_model()
    model.save_pretrained(str(tmp_path / "outer"))
    for path in (tmp_path / "outer").glob("gem_*.py"):
        path.unlink()
    inner = tmp_path / "outer" / "inner"
    model.save_pretrained(str(inner))
    np.testing.assert_allclose(encode_without_gem_st(inner, None), model.encode(CORPUS), atol=1e-6)
    assert not list((tmp_path / "outer").glob("gem_*.py"))
