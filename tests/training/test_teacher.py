"""Distillation: targets, the head, and a training that follows a teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from gem_st.evaluation.baselines import build_baseline
from gem_st.training.config import load_config
from gem_st.training.data import TrainData
from gem_st.training.preview import preview
from gem_st.training.run import load_data, train
from gem_st.training.teacher import add_head, cut_pieces, follow_teacher, label_by_teacher

from ..conftest import CORPUS

TEXTS = [f"{text[:-1]}, number {index}." for index in range(12) for text in CORPUS]


@pytest.fixture
def teacher(make_base, tmp_path) -> SentenceTransformer:
    """An embedder of 48 dimensions, which the students do not have."""
    torch.manual_seed(1)
    model = build_baseline("mean", str(make_base()))
    model.append(Dense(32, 48, activation_function=None))
    model.save_pretrained(str(tmp_path / "teacher"))
    return SentenceTransformer(str(tmp_path / "teacher"), device="cpu")


def test_labels_are_the_teachers_unit_vectors(teacher):
    one = label_by_teacher(Dataset.from_dict({"text": CORPUS}), teacher)
    expected = teacher.encode(CORPUS, normalize_embeddings=True)
    np.testing.assert_allclose(np.array(one["label"]), expected, atol=1e-6)
    two = label_by_teacher(Dataset.from_dict({"anchor": CORPUS, "positive": CORPUS[::-1]}), teacher)
    np.testing.assert_allclose(np.array(two["label"]), np.stack([expected, expected[::-1]], 1), atol=1e-6)


def test_the_head_starts_as_the_regression_of_one_space_on_the_other(make_model):
    model = make_model(num_gem_tokens=2)
    mapped = model.encode(TEXTS, convert_to_tensor=True) @ torch.randn(
        32, 48, generator=torch.Generator().manual_seed(0)
    )
    targets = torch.nn.functional.normalize(mapped, dim=-1)
    add_head(model, TEXTS[:64], targets[:64], ridge=1e-9)
    vectors = model.encode(TEXTS[64:], convert_to_tensor=True)
    assert vectors.shape == (len(TEXTS) - 64, 48)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    assert torch.nn.functional.cosine_similarity(vectors, targets[64:]).min() > 0.99


@pytest.mark.parametrize("columns", [["text"], ["anchor", "positive"]])
def test_a_training_follows_the_teacher(make_base, teacher, tmp_path, columns):
    Dataset.from_dict(dict(zip(columns, (TEXTS, TEXTS[::-1]), strict=False))).to_json(str(tmp_path / "data.jsonl"))
    config = load_config(
        base=make_base(),
        data=tmp_path / "data.jsonl",
        output=tmp_path / "out",
        teacher=tmp_path / "teacher",
        mode="frozen",
        steps=12,
        batch_size=16,
        learning_rate=2e-5,
        held_out=8,
        precision="float32",
        training_arguments={"use_cpu": True, "disable_tqdm": True},
    )
    result = train(config)
    name = "similarity to the teacher's vector, mean"
    assert result.before[name] < result.after[name] < 1.001
    student = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    queries, index = student.encode(TEXTS[:8]), teacher.encode(TEXTS[:8], normalize_embeddings=True)
    assert queries.shape == index.shape == (8, 48)
    assert (queries * index).sum(1).mean() > result.before[name]


def test_pieces_are_sentences_and_short_spans_of_the_texts():
    texts = [
        "The first sentence has six words. Short one. And the third one is long again!",
        "京都は古い都です。そこには寺がたくさんあります。",
    ]
    dataset = Dataset.from_dict({"text": texts})
    pieces = cut_pieces(dataset, [], seed=0)["text"]
    assert pieces == cut_pieces(dataset, [], seed=0)["text"] != cut_pieces(dataset, [], seed=1)["text"]
    assert len(pieces) == len(set(pieces))
    assert {*texts, "The first sentence has six words.", "And the third one is long again!"} < {*pieces}
    assert "そこには寺がたくさんあります。" in pieces
    assert "Short one." not in pieces
    spans = [piece for piece in pieces if piece in texts[0] and not piece.endswith((".", "!"))]
    assert spans
    assert all(3 <= len(span.split()) <= 10 for span in spans)
    assert any(6 <= len(piece) <= 20 and piece in texts[1] for piece in pieces)


def test_pieces_are_not_of_what_is_held_out(make_base, tmp_path):
    texts = [f"This is sentence {index} of one. Here is one more of {index}." for index in range(40)]
    texts += [f"This is sentence {index} of one." for index in range(40)]
    Dataset.from_dict({"text": texts}).to_json(str(tmp_path / "data.jsonl"))
    options = {"base": make_base(), "data": tmp_path / "data.jsonl", "teacher": tmp_path, "mode": "frozen"}
    data = load_data(load_config(**options, held_out=8, pieces=True))
    assert len(data.held_out) == 8
    assert data.num_rows == len(data.train) > 72
    assert {row["text"] for row in data.held_out}.isdisjoint(data.train["text"])
    Dataset.from_dict({"a": texts, "b": texts}).to_json(str(tmp_path / "data.jsonl"))
    with pytest.raises(ValueError, match="pieces are cut from one column of text"):
        load_data(load_config(**options, pieces=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pieces": True}, "pieces are for a teacher"),
        ({"pieces": True, "teacher": "t", "mode": "full"}, "pieces are no whole texts"),
        ({"pieces": True, "teacher": "t", "data": None, "self_generate": 9}, "from the texts of an index"),
        ({"teacher": "t", "views": ["crops"]}, "stands in for a second view"),
        ({"teacher": "t", "tasks": ["continuation"], "plain_ratio": 0.5}, "vectors are of whole texts"),
    ],
)
def test_options_that_do_not_fit_a_teacher(options, reason):
    with pytest.raises(ValueError, match=reason):
        load_config(**{"base": "b", "data": "d", "mode": "frozen", **options}).check()


@pytest.mark.parametrize("columns", [["text"], ["prompt", "answer"]])
def test_texts_with_a_teachers_vector_are_not_cut(columns):
    assert load_config(base="b", data="d", teacher="t", steps=2).resolve(9, columns).tasks == ["reconstruction"]
    assert load_config(base="b", data="d", teacher="t", mode="frozen", steps=2).resolve(9, columns).tasks == []


def test_the_preview_of_a_teacher_shows_pieces_and_no_second_view(make_base, tmp_path):
    Dataset.from_dict({"text": TEXTS}).to_json(str(tmp_path / "data.jsonl"))
    options = {"base": make_base(), "data": tmp_path / "data.jsonl", "teacher": "t", "mode": "frozen", "steps": 2}
    shown = preview(load_config(**options, pieces=True))
    assert shown.num_rows > 2 * len(TEXTS)
    assert {kind for kind, _ in shown.rows} == {"plain"}


def test_a_row_without_text_is_named(teacher):
    for label in (lambda data: label_by_teacher(data, teacher), lambda data: cut_pieces(data, [], seed=0)):
        with pytest.raises(ValueError, match="Row 1 of column 'text' of the training set is None"):
            label(Dataset.from_dict({"text": ["A text.", None]}))


def test_what_a_teacher_needs_is_said(make_base, make_model, teacher, tmp_path):
    with pytest.raises(ValueError, match="a teacher embeds all rows before the training"):
        load_config(base=make_base(), data=tmp_path, teacher=tmp_path, streaming=True, steps=2).check()
    data = TrainData(Dataset.from_dict({"text": CORPUS}), ["text"], len(CORPUS), [])
    with pytest.raises(ValueError, match="A head from 32 dimensions cannot be fitted on 8 rows"):
        follow_teacher(str(tmp_path / "teacher"), make_model(), data)
