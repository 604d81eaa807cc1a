"""Continuous batching: answers that are written together, and embeddings between their steps."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from openai import APIStatusError
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer
from gem_st.serving.chat import ALONE_ONLY, FirstOfEqual
from gem_st.serving.engine import Engine

from ..modeling.test_gem_generator import CHAT
from .served import AS_JSON, MESSAGES, serving
from .test_chat import stock_answer

TEXTS = ["Hello there", "The fisherman took his boat", "It rained all day, and the children", "Bread", "Why", "A king"]


@pytest.fixture(scope="module", params=["frozen", "full"])
def batched(request, make_served_model) -> Iterator[Any]:
    settings = {"freeze_base": True, "num_gem_tokens": 2} if request.param == "frozen" else {}
    with serving(make_served_model(**settings), continuous_batching=True, cache_bytes=2**22) as served:
        yield served


@pytest.fixture
def small(make_served_model) -> Iterator[Any]:
    """A server that has places for 160 tokens of answers."""
    model = make_served_model(freeze_base=True)
    with serving(model, continuous_batching=True, cache_bytes=5 * page_bytes(model)) as served:
        yield served


def page_bytes(model) -> int:
    config = model[0].model.config
    head = config.hidden_size // config.num_attention_heads
    return 32 * config.num_hidden_layers * 2 * config.num_key_value_heads * head * 4


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def loop_of(served) -> Any:
    return served.server.engine.chat.batches.loop


def test_answers_written_together_are_those_of_the_stock_base_and_vectors_those_of_encode(batched, make_base):
    def ask(text: str) -> str:
        options = {"model": "tiny", "messages": say(text), "max_tokens": 24, "temperature": 0}
        whole = batched.openai.chat.completions.create(**options)
        parts = list(batched.openai.chat.completions.create(**options, stream=True))
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        assert whole.choices[0].message.content.startswith(streamed.rstrip("\ufffd"))
        assert parts[-1].usage == whole.usage
        return whole.choices[0].message.content

    def embed(text: str) -> list[float]:
        return batched.openai.embeddings.create(model="tiny", input=text).data[0].embedding

    with ThreadPoolExecutor(12) as pool:
        answers, vectors = pool.map(ask, TEXTS), pool.map(embed, TEXTS)
        assert list(answers) == [stock_answer(batched, make_base, say(text), 24) for text in TEXTS]
        np.testing.assert_allclose(list(vectors), batched.model.encode(TEXTS), atol=1e-4)
    np.testing.assert_allclose(embed(TEXTS[0]), batched.model.encode(TEXTS[0]), atol=1e-4)  # while nothing is written
    text = batched.openai.completions.create(model="tiny", prompt="Once upon", max_tokens=5)
    assert (text.usage.completion_tokens, len(text.choices[0].text) > 0) == (5, True)
    assert 'gem_st_tokens_total{kind="written"}' in batched.send("GET", "/metrics").body


def test_a_gem_token_is_never_written(make_served_model):
    with serving(make_served_model(num_reserved=4), continuous_batching=True, cache_bytes=2**22) as served:
        (suppressing,) = loop_of(served).logit_processor.logits_processor
        ids = served.model[0].gem_token_ids
        assert set(ids) <= set(suppressing.suppress_tokens.tolist())
        name = served.model.tokenizer.convert_ids_to_tokens(ids[0])
        refused = served.post("completions", {"prompt": f"Hello {name} there", "max_tokens": 2})
        assert (refused.status, refused.error["param"]) == (400, "prompt")


def test_what_all_answers_share_cannot_be_set_by_one(batched):
    for field, value in (("stop", "."), ("logit_bias", {"5": 3}), ("frequency_penalty", 0.5)):
        reply = batched.post("chat/completions", {"messages": MESSAGES, field: value})
        assert (reply.status, reply.error["param"]) == (400, field)
        assert "--continuous-batching" in reply.error["message"]
    body = {"messages": MESSAGES, "stop": [], "frequency_penalty": 0, "seed": 3, "temperature": 0.7, "max_tokens": 1}
    assert batched.post("chat/completions", body).status == 200  # of which none changes a greedy answer


def test_a_model_that_samples_is_greedy_for_who_asks(make_served_model, make_base):
    model = make_served_model(freeze_base=True)
    config = model[0].model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 1.2, 20
    with serving(model, continuous_batching=True, cache_bytes=2**22) as served:

        def ask(temperature: float) -> str:
            options = {"messages": MESSAGES, "max_tokens": 16, "temperature": temperature}
            done = served.openai.chat.completions.create(model="tiny", **options)
            return done.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            greedy, free = list(pool.map(ask, [0] * 4)), list(pool.map(ask, [2] * 4))
        assert greedy == [stock_answer(served, make_base, MESSAGES, 16)] * 4
        assert len({*free, greedy[0]}) > 2
        for field, value in (("top_p", 0.5), ("seed", 1)):  # of top_p the model has none
            reply = served.post("chat/completions", {"messages": MESSAGES, field: value})
            assert (reply.status, reply.error["param"]) == (400, field)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(batched, stream):
    loop = loop_of(batched)
    connection = http.client.HTTPConnection("127.0.0.1", batched.port, timeout=60)
    body = {"messages": MESSAGES, "stream": stream}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), AS_JSON)
    while not loop.batch_processor.scheduler.active_requests:
        time.sleep(0.001)
    connection.close()
    batched.wait_for_empty_queue()
    assert batched.post("embeddings", {"input": "still here"}).status == 200  # after the loop's next step
    assert not loop.batch_processor.scheduler.has_pending_requests()
    assert not loop.output_router.result_handlers


def test_answers_that_do_not_all_fit_wait_for_each_other(small):
    def ask(number: int) -> Any:
        messages = say(f"Tell me of {number}")
        return small.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=100).usage

    with ThreadPoolExecutor(8) as pool:
        usages = list(pool.map(ask, range(8)))
    assert sum(usage.total_tokens for usage in usages) > 2 * 160  # more than there is room for at once
    reply = small.post("completions", {"prompt": "word " * 200, "max_tokens": 1})
    assert (reply.status, reply.error["code"]) == (413, "context_length_exceeded")
    assert "there is room for 159" in reply.error["message"]
    with pytest.raises(APIStatusError, match="there is room for 159"):
        small.openai.completions.create(model="tiny", prompt="word " * 200)
    done = small.openai.completions.create(model="tiny", prompt="word")
    assert done.usage.total_tokens <= 160


def test_a_loop_that_failed_is_told_of_and_embeddings_go_on(small, monkeypatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop_of(small).batch_processor, "_generation_step", fail)
    body = {"messages": MESSAGES, "max_tokens": 4}
    assert small.post("chat/completions", body).status in (500, 503)  # the one that it failed at
    small.wait_for_empty_queue()
    while small.server.engine.chat.is_alive:
        time.sleep(0.01)
    for stream in (False, True):
        reply = small.post("chat/completions", {**body, "stream": stream})
        assert (reply.status, reply.error["code"]) == (503, "failed")
    assert small.send("GET", "/health").status == 503
    vector = small.openai.embeddings.create(model="tiny", input="bread").data[0].embedding
    np.testing.assert_allclose(vector, small.model.encode("bread"), atol=1e-4)


def test_what_cannot_be_written_together_is_said_when_the_server_starts(make_served_model):
    model = make_served_model(freeze_base=True)
    with pytest.raises(ValueError, match="needs memory"):
        Engine(model, "tiny", continuous_batching=True, cache_bytes=page_bytes(model))
    eager = make_served_model(freeze_base=True, model_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="with eager attention cannot do continuous batching"):
        Engine(eager, "tiny", continuous_batching=True)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3", "phi3"])
def test_answers_of_other_models_are_those_of_the_stock_base(architecture, make_served_model, make_base):
    model = make_served_model(architecture, freeze_base=True)
    with serving(model, continuous_batching=True, cache_bytes=2**20) as served:

        def ask(text: str) -> str:
            options = {"model": "tiny", "messages": say(text), "max_tokens": 24, "temperature": 0}
            return served.openai.chat.completions.create(**options).choices[0].message.content

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, TEXTS)) == [
                stock_answer(served, make_base, say(text), 24, architecture) for text in TEXTS
            ]


def test_who_waits_is_let_in_when_the_answer_that_is_written_is_given_up(make_served_model, monkeypatch):
    model = make_served_model(freeze_base=True)
    model[0].model.generation_config.eos_token_id = None  # answers are as long as they may be
    with serving(model, continuous_batching=True, cache_bytes=5 * page_bytes(model)) as served:
        processor = loop_of(served).batch_processor
        step = processor._generation_step
        monkeypatch.setattr(processor, "_generation_step", lambda *args: (time.sleep(0.01), step(*args)))
        streams = {}
        with loop_of(served).pause():  # both begin together, and there is no memory for both
            for text in TEXTS[:2]:
                connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
                body = {"messages": say(text), "max_tokens": 120, "stream": True}
                connection.request("POST", "/v1/chat/completions", json.dumps(body), AS_JSON)
                response = connection.getresponse()
                streams[response.headers["x-request-id"]] = connection, response
        while not processor.scheduler.block_new_requests:
            time.sleep(0.001)
        (written,) = processor.scheduler.active_requests
        for gone in streams.pop(written):
            gone.close()
        ((_, response),) = streams.values()
        assert response.read().endswith(b"data: [DONE]\n\n")
        served.wait_for_empty_queue()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_over_before_it_is_listened_to_is_sent(batched, monkeypatch, stream):
    loop = loop_of(batched)._loop
    add = loop.add_request

    def add_and_wait(*args: Any, **options: Any) -> str | None:
        added = add(*args, **options)
        time.sleep(0.3)
        return added

    monkeypatch.setattr(loop, "add_request", add_and_wait)
    reply = batched.post("chat/completions", {"messages": MESSAGES, "max_tokens": 1, "stream": stream})
    assert '"completion_tokens":1,' in (reply.body if stream else json.dumps(reply.body, separators=(",", ":")))
    assert not loop.output_router.result_handlers
    assert loop.output_router.output_queue.empty()


@pytest.mark.parametrize("stream", [True, False])
def test_a_loop_that_ends_while_it_is_asked_is_told_of(small, monkeypatch, stream):
    loop = loop_of(small)._loop

    def add_too_late(*args: Any, request_id: str, **options: Any) -> str:
        loop.background_thread_status.record_fatal_error(RuntimeError("out of memory"))
        return request_id

    monkeypatch.setattr(loop, "add_request", add_too_late)
    reply = small.post("chat/completions", {"messages": MESSAGES, "max_tokens": 4, "stream": stream})
    assert (reply.status, reply.error["code"]) == (503, "failed")


def test_an_embedding_that_waits_for_a_loop_that_fails_is_made(small, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def fail(*args: Any) -> None:
        begun.set()
        go.wait(30)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop_of(small).batch_processor, "_generation_step", fail)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(small.post, "chat/completions", {"messages": MESSAGES, "max_tokens": 4})
        assert begun.wait(30)
        embedded = pool.submit(small.post, "embeddings", {"input": "bread"})
        while not loop_of(small).background_thread_status.is_pause_requested():
            time.sleep(0.001)
        go.set()
        vector = embedded.result(20).body["data"][0]["embedding"]
    np.testing.assert_allclose(vector, small.model.encode("bread"), atol=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("repetition_penalty", 1.1), ("min_new_tokens", 5), ("stop_strings", ["."]), ("num_beams", 2), ("max_time", 1.0)],
)
def test_what_the_loop_would_leave_out_is_refused_when_the_server_starts(make_served_model, option, value):
    model = make_served_model(freeze_base=True)
    assert option in ALONE_ONLY
    setattr(model[0].model.generation_config, option, value)
    with pytest.raises(ValueError, match=f"sets {option}, which continuous batching cannot do"):
        Engine(model, "tiny", continuous_batching=True, cache_bytes=2**22)


def test_a_model_that_samples_has_the_defaults_of_generate(make_served_model, make_base):
    model = make_served_model(freeze_base=True)
    config = model[0].model.generation_config
    config.do_sample, config.top_p = True, 0.9
    with serving(model, continuous_batching=True, cache_bytes=2**22) as served:
        assert (loop_of(served).generation_config.top_k, loop_of(served).generation_config.temperature) == (50, 1.0)
        body = {"messages": MESSAGES, "max_tokens": 16}
        for cold in (0, 1e-300):
            reply = served.post("chat/completions", {**body, "temperature": cold})
            text = reply.body["choices"][0]["message"]["content"]
            assert text == stock_answer(served, make_base, MESSAGES, 16)
        assert served.post("chat/completions", {**body, "temperature": 1, "top_p": 0.5}).status == 200


def test_a_temperature_that_leaves_no_number_is_0_and_ends_no_loop(make_served_model, make_base):
    model = make_served_model(freeze_base=True)
    config = model[0].model.generation_config
    config.do_sample, config.temperature = True, 0.6
    with serving(model, continuous_batching=True, cache_bytes=2**22) as served:
        reply = served.post("chat/completions", {"messages": MESSAGES, "max_tokens": 16, "temperature": 1e-40})
        assert reply.body["choices"][0]["message"]["content"] == stock_answer(served, make_base, MESSAGES, 16)
        assert served.send("GET", "/health").status == 200


def test_of_equals_the_first_is_left():
    inf = torch.inf
    scores = torch.tensor([[-inf, 2.0, 2.0, -inf], [1.0, 2.0, 2.0, -inf], [-inf, -inf, 3.0, -inf]])
    want = torch.tensor([[-inf, 2.0, -inf, -inf], [1.0, 2.0, 2.0, -inf], [-inf, -inf, 3.0, -inf]])
    assert torch.equal(FirstOfEqual()(None, scores), want)


def test_an_answer_as_long_as_is_said_fits_into_layers_of_two_kinds(make_base):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"] * 2
    layers = {"num_hidden_layers": 10, "layer_types": kinds, "sliding_window": 256}
    base = make_base("gemma3", chat_template=CHAT, **layers)
    model = SentenceTransformer(modules=[GemTransformer(str(base), freeze_base=True)], device="cpu")
    model[0].model.generation_config.eos_token_id = None
    seven_pages = 7 * 32 * 10 * 2 * 2 * 8 * 4
    with serving(model, continuous_batching=True, cache_bytes=seven_pages) as served:
        done = served.openai.completions.create(model="tiny", prompt="word", max_tokens=1000)
        assert done.usage.total_tokens == served.server.engine.chat.batches.room == 192
        assert served.send("GET", "/health").status == 200


def test_a_token_that_only_the_tokenizer_has_is_refused(make_served_model):
    model = make_served_model(freeze_base=True)
    with serving(model, continuous_batching=True, cache_bytes=2**22) as served:
        served.server.engine.tokenizer.add_tokens([f"<new{number}>" for number in range(300)])
        reply = served.post("completions", {"prompt": "Hello <new299>", "max_tokens": 2})
        assert (reply.status, reply.error["param"]) == (400, "prompt")
        assert served.send("GET", "/health").status == 200


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_other_answers_are_refused(make_served_model, kind):
    model = make_served_model(freeze_base=True)
    model[0].model.config.rope_parameters["rope_type"] = kind
    with pytest.raises(ValueError, match=f"With {kind} positions answers"):
        Engine(model, "tiny", continuous_batching=True, cache_bytes=2**22)


def test_a_model_that_cannot_write_so_is_refused_when_the_server_starts(make_served_model, monkeypatch):
    model = make_served_model(freeze_base=True)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("cu_seq_lens_k")

    monkeypatch.setattr(model[0].model, "forward", fail)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot do continuous batching"):
        Engine(model, "tiny", continuous_batching=True, cache_bytes=2**22)
