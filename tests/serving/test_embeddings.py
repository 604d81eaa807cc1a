"""Embeddings over HTTP: the vectors of `encode`, as OpenAI's clients ask for them."""

from __future__ import annotations

import base64
import threading

import numpy as np
import pytest
import torch

from gem_st.serving.embeddings import FIRST_TOKENS, EmbeddingQueue, Job, Kind, Pace

from ..conftest import CORPUS
from .served import MESSAGES, serving


def vectors_of(reply):
    return np.array([item["embedding"] for item in reply.body["data"]], dtype=np.float32)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_vectors_are_those_of_encode(mode, request):
    served = request.getfixturevalue(mode)
    texts = [*CORPUS, "", "a", "🙂 emoji"]
    expected = served.model.encode(texts)
    for encoding in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        got = served.openai.embeddings.create(model="tiny", input=texts, **encoding)
        assert [item.index for item in got.data] == [*range(len(texts))]
        np.testing.assert_allclose([item.embedding for item in got.data], expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)  # the module behind is part of it
    one = served.post("embeddings", {"input": texts[0]})
    np.testing.assert_allclose(vectors_of(one)[0], expected[0], atol=1e-4)
    num_tokens = len(served.model.tokenizer(texts[0])["input_ids"])
    assert one.body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert one.body["model"] == "tiny"


def test_base64_is_of_floats_of_32_bits(full):
    reply = full.post("embeddings", {"input": "bread", "encoding_format": "base64"})
    raw = base64.b64decode(reply.body["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), full.model.encode("bread"), atol=1e-5)


def test_token_ids_are_read_as_they_are(frozen):
    rows = [frozen.model.tokenizer(text)["input_ids"] for text in CORPUS[:3]]
    reply = frozen.post("embeddings", {"input": rows})
    np.testing.assert_allclose(vectors_of(reply), frozen.model.encode(CORPUS[:3]), atol=1e-4)
    one = frozen.post("embeddings", {"input": rows[0]})
    np.testing.assert_allclose(vectors_of(one), frozen.model.encode(CORPUS[:1]), atol=1e-4)


def test_token_ids_are_refused_where_they_were_not_allowed(full):
    for given in ([5, 6], [[5, 6], [7]]):
        refused = full.post("embeddings", {"input": given})
        assert (refused.status, refused.error["param"]) == (400, "input")
        assert "check_embedding_ctx_length=False" in refused.error["message"]
        assert "--allow-token-ids" in refused.error["message"]
    assert full.post("embeddings", {"input": ["5", "6"]}).status == 200


def test_prompts_are_those_of_the_checkpoint(frozen):
    text, model = CORPUS[0], frozen.model
    cases = [
        ({"input_type": "query"}, model.encode_query(text)),
        ({"input_type": "document"}, model.encode_document(text)),
        ({"prompt_name": "title"}, model.encode(text, prompt_name="title")),
        ({}, model.encode(text)),
    ]
    for fields, expected in cases:
        reply = frozen.post("embeddings", {"input": text, **fields})
        np.testing.assert_allclose(vectors_of(reply)[0], expected, atol=1e-4)
        through_client = frozen.openai.embeddings.create(model="tiny", input=text, extra_body=fields)
        np.testing.assert_allclose(through_client.data[0].embedding, expected, atol=1e-4)
    assert np.abs(cases[0][1] - cases[1][1]).max() > 1e-3
    refused = frozen.post("embeddings", {"input": text, "prompt_name": "none"})
    assert (refused.status, refused.error["param"]) == (400, "prompt_name")
    assert "query" in refused.error["message"]
    refused = frozen.post("embeddings", {"input": [5, 6], "input_type": "query"})
    assert (refused.status, refused.error["param"]) == (400, "input_type")


def test_fewer_dimensions_are_given_where_that_was_allowed(frozen, full):
    got = frozen.openai.embeddings.create(model="tiny", input=CORPUS, dimensions=8)
    expected = frozen.model.encode(CORPUS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose([item.embedding for item in got.data], expected, atol=1e-4)
    refused = full.post("embeddings", {"input": "a", "dimensions": 8})
    assert (refused.status, refused.error["param"]) == (400, "dimensions")
    assert "--allow-truncate" in refused.error["message"]
    assert full.post("embeddings", {"input": "a", "dimensions": 32}).status == 200
    assert frozen.post("embeddings", {"input": "a", "dimensions": 33}).status == 400


@pytest.mark.parametrize("num_gem_tokens", [1, 3])
def test_a_conversation_costs_the_tokens_that_are_new(make_served_model, num_gem_tokens):
    model = make_served_model(freeze_base=True, num_gem_tokens=num_gem_tokens)
    gem = model[0]

    def expected(messages):
        cache = gem.prefill(messages, chat_template_kwargs={"add_generation_prompt": False})
        return torch.nn.functional.normalize(gem.summarize(cache)).numpy()

    longer = [*MESSAGES, {"role": "assistant", "content": "The fisherman did, every day."}]
    other = [*MESSAGES[:1], {"role": "user", "content": "Nothing of that."}]
    with serving(model) as served, serving(model, cache_bytes=0) as forgetful:
        reused = []
        for messages in (MESSAGES, MESSAGES, longer, other):
            reply = served.post("embeddings", {"messages": messages})
            np.testing.assert_allclose(vectors_of(reply), expected(messages), atol=1e-4)
            reused.append(int(reply.headers["x-gem-reused-tokens"]))
            cold = forgetful.post("embeddings", {"messages": messages})
            np.testing.assert_allclose(vectors_of(cold), expected(messages), atol=1e-4)
            assert "x-gem-reused-tokens" not in cold.headers
            assert cold.body["usage"] == reply.body["usage"]
        num_tokens = served.post("embeddings", {"messages": MESSAGES}).body["usage"]["prompt_tokens"]
        assert reused[:3] == [0, num_tokens, num_tokens]
        assert 8 < reused[3] < num_tokens  # what the system said
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    with serving(model) as served:
        np.testing.assert_allclose(
            vectors_of(served.post("embeddings", {"messages": parts})), expected(MESSAGES), atol=1e-4
        )


def test_requests_that_arrive_together_are_one_batch(frozen, monkeypatch):
    """While the inference thread is held, eight requests gather; they are then embedded at once."""
    engine = frozen.server.engine
    sizes, encode = [], frozen.model.encode

    def counting(texts, **kwargs):
        sizes.append(len(texts))
        return encode(texts, **kwargs)

    monkeypatch.setattr(engine.model, "encode", counting)
    hold = threading.Event()
    engine.chat.thread.submit(hold.wait)
    replies = [None] * 8

    def ask(index):
        replies[index] = frozen.post("embeddings", {"input": CORPUS[index]})

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    while sum(map(len, engine._embeddings._waiting.values())) < 8:
        pass
    hold.set()
    for thread in threads:
        thread.join()
    assert sizes == [8]
    np.testing.assert_allclose([vectors_of(reply)[0] for reply in replies], encode(CORPUS), atol=1e-4)


class Recorder:
    """An embedding function that notes its batches, and fails at a row named "bad"."""

    def __init__(self):
        self.batches = []

    def __call__(self, kind, rows, jobs):
        self.batches.append(rows)
        if "bad" in rows:
            raise RuntimeError("bad row")
        return [f"vector of {row}" for row in rows]


def test_batches_hold_so_many_tokens_and_kinds_take_turns():
    record, done = Recorder(), []
    queue = EmbeddingQueue(record, batch_tokens=10)
    plain, query = Kind("text"), Kind("text", "Find: ")
    queue.put(Job(plain, ["a", "b", "c"], [4, 4, 4], done.append))
    queue.put(Job(query, ["d"], [4], done.append))
    queue.put(Job(plain, ["long", "e"], [40, 2], done.append))
    dropped = Job(plain, ["gone"], [1], done.append)
    queue.put(dropped)
    dropped.is_cancelled = True
    queue.put(Job(Kind("conversation"), [[1], [2]], [1, 1], done.append))
    queue.run(60)
    assert record.batches == [["a", "b"], ["d"], [[1]], ["c"], [[2]], ["long"], ["e"]]
    assert [job.rows[0] for job in done] == ["d", "a", [1], "long"]
    assert done[1].vectors == ["vector of a", "vector of b", "vector of c"]
    assert not queue


def test_a_slice_ends_after_the_batch_that_outlasts_it():
    record = Recorder()
    queue = EmbeddingQueue(record, batch_tokens=1)
    queue.put(Job(Kind("text"), ["a", "b"], [1, 1], lambda job: None))
    queue.run(0)
    assert record.batches == [["a"]]
    assert queue


def test_the_pace_is_a_line_through_what_was_seen():
    pace = Pace()
    assert pace.fitting(1, 10) == FIRST_TOKENS
    pace.note(100, 0.5)
    assert pace.line() == pytest.approx((0, 0.005))  # one batch does not tell more
    assert pace.fitting(1, 10) == pytest.approx(200)
    assert pace.fitting(0.05, 10) == pytest.approx(20)  # twice the time of the first row
    pace = Pace()
    for num_tokens in (64, 500, 128, 900):
        pace.note(num_tokens, 0.5 + 0.001 * num_tokens)
    assert pace.line() == pytest.approx((0.5, 0.001))
    assert pace.fitting(0.05, 64) == pytest.approx(628)
    for _ in range(9):
        pace.note(64, 0.1)  # faster, whatever it was before
    fixed, slope = pace.line()
    assert fixed >= 0
    assert slope > 0


def test_batches_that_are_awaited_fit_into_the_time():
    record = Recorder()
    queue = EmbeddingQueue(record, batch_tokens=1000)
    queue.put(Job(Kind("text"), [*"abcdefg", "long"], [10] * 7 + [500], lambda job: None))
    queue.pace.note(1000, 1.0)
    assert [row for _, row in queue.take(0.035).items] == [0, 1, 2]
    assert [row for _, row in queue.take(0).items] == [3, 4]
    assert [row for _, row in queue.take().items] == [5, 6, 7]


def test_a_request_does_not_fail_for_another_one():
    record, done = Recorder(), []
    queue = EmbeddingQueue(record, batch_tokens=100)
    for rows in (["a"], ["b", "bad"], ["c"]):
        queue.put(Job(Kind("text"), rows, [1] * len(rows), done.append))
    queue.run(60)
    assert {job.rows[0]: str(job.error) for job in done} == {"a": "None", "b": "bad row", "c": "None"}
