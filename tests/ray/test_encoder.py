"""gem_st.ray.Encoder on tables: no Ray is needed for it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from gem_st import hub
from gem_st.ray import EncodeError, Encoder
from gem_st.ray.config import PRECISIONS
from gem_st.ray.encoder import convert, token_batches

from ..conftest import CORPUS
from .conftest import make_texts


def table_of(texts, **columns):
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string()), **columns})


def vectors_of(table) -> np.ndarray:
    return np.array(table["vector"].to_pylist())


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_batches_hold_so_many_tokens_with_their_padding_and_begin_with_the_longest():
    assert token_batches([3, 9, 4, 1, 20], 10) == [[4], [1], [2, 0], [3]]
    assert token_batches([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]
    assert token_batches([], 4) == []


def test_a_long_text_does_not_pad_fifty_short_ones():
    lengths = [20] * 25 + [8000] + [20] * 25
    batches = token_batches(lengths, 8192)
    assert batches == [[25], [*range(25), *range(26, 51)]]
    assert sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) == 8000 + 50 * 20


def test_vectors_are_those_of_encode_document_in_the_order_of_the_table(checkpoint):
    model, encoder, texts = hub.load(checkpoint), Encoder(checkpoint, batch_tokens=64), make_texts(40)
    result = encoder(table_of(texts))
    assert result["vector"].type == pa.list_(pa.float32(), 32)
    assert result["id"].to_pylist() == list(range(40))
    np.testing.assert_allclose(vectors_of(result), model.encode_document(texts), rtol=1e-5, atol=1e-5)
    plain = model.encode(texts)
    assert np.abs(vectors_of(result) - plain).max() > 1e-3  # the prompt counts
    query = Encoder(checkpoint, prompt_name="query")(table_of(texts))
    np.testing.assert_allclose(vectors_of(query), model.encode(texts, prompt_name="query"), rtol=1e-5, atol=1e-5)


def test_a_table_gives_the_same_bits_again(checkpoint):
    table = table_of(make_texts(40))
    assert Encoder(checkpoint)(table).equals(Encoder(checkpoint)(table))


def test_equal_texts_are_embedded_once(checkpoint, monkeypatch):
    encoder, seen = Encoder(checkpoint), []
    whole = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: seen.extend(texts) or whole(texts))
    result = vectors_of(encoder(table_of([CORPUS[0], CORPUS[1], CORPUS[0], CORPUS[0]])))
    assert sorted(seen) == sorted(CORPUS[:2])
    assert (result[[2, 3]] == result[0]).all()
    assert not (result[1] == result[0]).any()


def test_null_blank_and_long_texts_are_told_with_their_ids(checkpoint, tmp_path):
    long = " ".join(CORPUS * 8)
    encoder = Encoder(checkpoint, report=str(tmp_path / "reports"))
    table = table_of([CORPUS[0], None, "", " \n", long])
    result = encoder(table)
    assert result["id"].to_pylist() == [0, 4]
    tokens = len(encoder.model.tokenizer("Text: " + long)["input_ids"]) + 2
    assert lines_of(tmp_path / "reports") == [
        {"id": 1, "reason": "null"},
        {"id": 2, "reason": "empty"},
        {"id": 3, "reason": "empty"},
        {"id": 4, "reason": "too long", "tokens": tokens, "read": 256},
    ]
    encoder(table)  # as after a restart
    assert len(lines_of(tmp_path / "reports")) == 4


def test_nothing_but_nulls_gives_an_empty_table_of_the_same_types(checkpoint):
    encoder = Encoder(checkpoint)
    empty = encoder(table_of([None, None]))
    assert len(empty) == 0
    assert empty.schema == encoder(table_of(CORPUS)).schema


def test_precisions_are_those_of_sentence_transformers(checkpoint):
    plain = hub.load(checkpoint).encode_document(CORPUS)
    half = vectors_of(Encoder(checkpoint, precision="float16")(table_of(CORPUS)))
    np.testing.assert_allclose(half, plain, rtol=1e-2, atol=1e-3)
    bits = Encoder(checkpoint, precision="binary")(table_of(CORPUS))
    assert bits["vector"].type == pa.list_(pa.int8(), 4)
    assert (vectors_of(bits) == quantize_embeddings(plain, "binary")).all()
    ranges = np.stack([plain.min(axis=0), plain.max(axis=0)])
    small = Encoder(checkpoint, precision="int8", ranges=ranges)
    expected = quantize_embeddings(plain, "int8", ranges=ranges)
    assert np.abs(vectors_of(small(table_of(CORPUS))) - expected).max() <= 1
    alone = vectors_of(small(table_of(CORPUS[2:3])))  # ranges are not those of the batch
    assert np.abs(alone - expected[2:3]).max() <= 1
    short = vectors_of(Encoder(checkpoint, truncate_dim=8)(table_of(CORPUS)))
    np.testing.assert_allclose(short, plain[:, :8], rtol=1e-5, atol=1e-5)


def test_what_is_outside_the_ranges_of_int8_stays_at_its_end():
    ranges = np.array([[-1.0, 0.0], [1.0, 2.0]], np.float32)
    found = convert(np.array([[-9.0, 9.0], [-1.0, 2.0]], np.float32), "int8", ranges)
    assert (found[:, 0] == -128).all()
    assert (found[:, 1] >= 126).all()  # and not -128, where nine would come out


def test_columns_that_are_asked_for_are_kept(checkpoint):
    result = Encoder(checkpoint, columns=["year"])(table_of(["a b", None, "c"], year=[1, 2, 3]))
    assert result.column_names == ["id", "year", "vector"]
    assert result["year"].to_pylist() == [1, 3]
    arrays = {"id": np.arange(2), "text": np.array(["a b", "c"])}
    assert Encoder(checkpoint)(arrays)["id"].to_pylist() == [0, 1]  # as Ray Data has it without batch_format


def test_columns_that_are_asked_for_twice_are_there_once(checkpoint):
    result = Encoder(checkpoint, columns=["year", "id", "year"])(table_of(["a b"], year=[1]))
    assert result.column_names == ["id", "year", "vector"]


def test_texts_are_cut_where_the_model_cuts_documents(checkpoint, tmp_path, monkeypatch):
    encoder = Encoder(checkpoint, report=str(tmp_path / "reports"))
    monkeypatch.setattr(encoder.model[0], "document_length", 5, raising=False)  # as stock modules have it
    encoder(table_of([CORPUS[0]]), "7.jsonl")
    assert [line["read"] for line in lines_of(tmp_path / "reports")] == [5]
    monkeypatch.undo()
    encoder(table_of([CORPUS[0]]), "7.jsonl")  # the same part, when its text is whole
    assert not lines_of(tmp_path / "reports")


def test_any_sentence_transformer_will_do(checkpoint, make_model, tmp_path):
    stock = hub.export(make_model(), tmp_path / "stock", format="stock") / "embedding"
    texts = make_texts(9)
    result = Encoder(str(stock), batch_tokens=100)(table_of(texts))
    expected = SentenceTransformer(str(stock)).encode(texts)
    np.testing.assert_allclose(vectors_of(result), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_does_not_give_its_reference_vectors_is_refused(checkpoint, tmp_path):
    path = tmp_path / "checkpoint" / "gem_reference.safetensors"
    tensors = load_file(path)
    tensors["embeddings"][3] *= 1.01
    save_file(tensors, path)
    with pytest.raises(EncodeError, match=r"does not give its reference vectors in float32: relative error 9\.9e-03"):
        Encoder(checkpoint)


def test_the_fingerprint_knows_weights_tokenizer_prompts_precision_and_width(checkpoint, tmp_path):
    first = Encoder(checkpoint).fingerprint
    assert (first["dimension"], first["prompt"]) == (32, "Text: ")
    changed = {
        "precision": Encoder(checkpoint, precision="float16").fingerprint,
        "dimension": Encoder(checkpoint, truncate_dim=8).fingerprint,
        "prompt": Encoder(checkpoint, prompt_name="query").fingerprint,
        "dtype": Encoder(checkpoint, dtype="bfloat16").fingerprint,
    }
    for key, other in changed.items():
        assert {name for name in first if first[name] != other[name]} - {"weights", "modules"} == {key}
    model = hub.load(checkpoint)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).view(-1)[0] += 1
    shutil.rmtree(tmp_path / "checkpoint")
    hub.export(model, checkpoint)
    other = Encoder(checkpoint).fingerprint
    assert {name for name in first if first[name] != other[name]} == {"weights"}


def test_code_that_is_not_ours_is_not_run_without_being_asked(checkpoint, tmp_path):
    (tmp_path / "checkpoint" / "gem_st.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Encoder(checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_vectors_that_are_not_finite_stop_the_run_with_their_ids(checkpoint, monkeypatch, precision, value):
    encoder = Encoder(checkpoint, precision=precision, ranges=np.array([[-1.0] * 32, [1.0] * 32]))
    monkeypatch.setattr(encoder, "_encode", lambda texts: np.full((len(texts), 32), value, np.float32))
    with pytest.raises(EncodeError, match=rf"Vectors of 2 texts are not finite in {precision}, ids \[0, 2\]"):
        encoder(table_of([CORPUS[0], None, CORPUS[1]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision must be one of"),
        ({"precision": "int8"}, "needs ranges="),
        ({"batch_tokens": 0}, "must be 1 or more"),
        ({"prompt_name": "nope"}, r"no prompt 'nope'\. It has: \['document', 'query'\]"),
        ({"truncate_dim": 64}, "the vectors have 32 elements"),
    ],
)
def test_options_are_checked(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        Encoder(checkpoint, **options)


def test_columns_that_are_missing_or_no_text(checkpoint):
    encoder = Encoder(checkpoint)
    with pytest.raises(EncodeError, match=r"no column 'text'\. There are: \['id', 'body'\]"):
        encoder(pa.table({"id": [1], "body": ["a"]}))
    with pytest.raises(EncodeError, match="'text' holds int64, and not text"):
        encoder(pa.table({"id": [1], "text": [2]}))
