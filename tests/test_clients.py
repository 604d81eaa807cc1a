"""Libraries that take a SentenceTransformer, or its name, by the lines of docs/integrations.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from .conftest import CORPUS
from .snippets import run_snippet

# What clients warn of is between them and their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")

BY_MAKE = "run by `make test-clients`"
TEXTS = [CORPUS[0], "Two lines\nof one text, which some clients make one."]
QUESTION = "Where is the train?"
SEA = ["The boat went out to sea.", "A boat by the sea.", "Fish of the sea and the boat.", "The sea took the boat."]
BREAD = ["Bread from the market.", "She bought bread.", "Apples, bread and cheese.", "Cheese on the bread."]


@pytest.fixture
def model(make_model) -> SentenceTransformer:
    """A model with prompts."""
    model = make_model(freeze_base=True, num_gem_tokens=2)
    model.prompts.update(query="Find: ", document="Text: ")
    return model


@pytest.fixture
def page(model, tmp_path, monkeypatch):
    """Function that runs the lines of a library in a folder with the checkpoint, and gives the names they define."""
    monkeypatch.chdir(tmp_path)

    def run(heading: str, texts: list[str] = TEXTS, **options: Any) -> dict[str, Any]:
        model.save_pretrained("gem-smollm2")
        replaced = options.pop("replaced", {})
        return run_snippet("integrations.md", heading, replaced, model=model, texts=texts, **options)

    return run


def check(model, documents, query) -> None:
    """Documents and query have their own prompts before them."""
    np.testing.assert_allclose(documents, model.encode_document(TEXTS), atol=1e-4)
    np.testing.assert_allclose(query, model.encode_query(QUESTION), atol=1e-4)
    assert np.abs(model.encode_query(QUESTION) - model.encode_document(QUESTION)).max() > 1e-3


def cosines(one, other):
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (np.array(one), np.array(other)))
    return one @ other.T


def test_keybert(page, model):
    pytest.importorskip("keybert", reason="keybert is not installed")
    names = page("KeyBERT")
    words = sorted(
        {word.strip(".").lower() for word in TEXTS[0].split()} - {"a", "by", "once", "there", "the", "upon", "was"}
    )
    scores = cosines(model.encode(TEXTS[:1]), model.encode(words))[0]
    found = dict(names["keywords"])
    assert set(found) == {words[i] for i in np.argsort(-scores)[:3]}
    for word, score in found.items():
        assert score == pytest.approx(scores[words.index(word)], abs=1e-3)
    np.testing.assert_allclose(names["document_vectors"], model.encode_document(TEXTS), atol=1e-5)


def test_setfit_trains_the_adapter_and_keeps_the_generator(page, model):
    pytest.importorskip("setfit", reason="setfit is not installed")
    texts, labels = [*SEA, *BREAD], [0] * 4 + [1] * 4

    def margin(model) -> float:
        """By how much texts are nearer to those of their own class."""
        rows = cosines(model.encode(texts), model.encode(texts))
        same = np.equal.outer(labels, labels)
        return rows[same & ~np.eye(8, dtype=bool)].mean() - rows[~same].mean()

    generated, before = model[0].generate("The boat", max_new_tokens=8), margin(model)
    base = {name: weight.clone() for name, weight in model[0].model.named_parameters() if not weight.requires_grad}
    names = page("SetFit", texts, labels=labels, replaced={"max_steps=100": "max_steps=20"})
    assert margin(model) > before + 0.1
    assert model[0].generate("The boat", max_new_tokens=8) == generated
    after = dict(model[0].model.named_parameters())
    assert base
    assert all((after[name] == weight).all() for name, weight in base.items())
    body = names["classifier"].model_body  # read from the disk
    assert type(body[0]).__name__ == "GemTransformer"
    np.testing.assert_allclose(body.encode(texts), model.encode(texts), atol=1e-5)
    assert list(names["predicted"]) == labels


def test_bertopic(page, model, monkeypatch):
    pytest.importorskip("bertopic", reason=BY_MAKE)
    texts, seen, encode = [*SEA, *BREAD, *CORPUS], [], model.encode

    def spy(given, **options):
        seen.append((list(given), vectors := encode(given, **options)))
        return vectors

    monkeypatch.setattr(model, "encode", spy)
    names = page("BERTopic", texts)
    vectors = next(vectors for given, vectors in seen if given == texts)
    np.testing.assert_allclose(vectors, encode(texts), atol=1e-5)
    numbers = np.array(names["numbers"])
    means = np.stack([vectors[numbers == topic].mean(0) for topic in sorted(set(numbers))])
    given, _ = names["topics"].transform(texts[:4])  # read from the disk: the nearest mean of a topic
    assert list(given) == list(cosines(vectors[:4], means).argmax(1))


def test_llama_index(page, model):
    pytest.importorskip("llama_index.embeddings.huggingface", reason=BY_MAKE)
    names = page("LlamaIndex")
    # It has vectors of length 1.
    documents, query = model.encode_document(TEXTS), model.encode_query(QUESTION)
    np.testing.assert_allclose(np.diag(cosines(names["documents"], documents)), 1, atol=1e-5)
    np.testing.assert_allclose(cosines([names["query"]], [query]), 1, atol=1e-5)


def test_chroma(page, model):
    pytest.importorskip("chromadb", reason=BY_MAKE)
    names = page("Chroma")
    stored = names["collection"].get(include=["embeddings"])["embeddings"]
    check(model, stored, model.encode_query(QUESTION))
    expected = 1 - cosines(model.encode_query([QUESTION]), model.encode_document(TEXTS))[0]
    for key, distance in zip(names["found"]["ids"][0], names["found"]["distances"][0], strict=True):
        assert distance == pytest.approx(expected[int(key) - 1], abs=1e-4)


def test_lancedb(page, model):
    pytest.importorskip("lancedb", reason=BY_MAKE)
    names = page("LanceDB")
    expected = 1 - cosines(model.encode_query([QUESTION]), model.encode_document(TEXTS))[0]
    assert len(names["found"]) == 2
    for row in names["found"]:
        assert row["_distance"] == pytest.approx(expected[TEXTS.index(row["text"])], abs=1e-4)


def test_txtai(page, model):
    pytest.importorskip("txtai", reason=BY_MAKE)
    names = page("txtai")
    normalized = [
        rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        for rows in (model.encode_document(TEXTS), model.encode_query(QUESTION))
    ]
    np.testing.assert_allclose(names["documents"], normalized[0], atol=1e-4)
    np.testing.assert_allclose(names["query"], normalized[1], atol=1e-4)
    for number, score in names["found"]:
        assert score == pytest.approx(normalized[0][number] @ normalized[1], abs=1e-3)
