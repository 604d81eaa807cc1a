"""What is refused, with which status and words; nothing that is sent breaks the server or is logged."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
import time

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import URL
from starlette.requests import Request

from gem_st.serving.app import ServerOptions
from gem_st.serving.bodies import ChatBody, CompletionBody, EmbeddingBody, Message
from gem_st.serving.engine import Engine
from gem_st.serving.run import ServeConfig

from .served import AS_JSON, MESSAGES, running, serving

CHAT = {"messages": MESSAGES, "max_tokens": 2}
TEXT = {"input": "a"}
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hello"}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat/completions", {"messages": [{"content": "no role"}]}, "messages"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {**CHAT, "max_tokens": "many"}, "max_tokens"),
        ("chat/completions", {**CHAT, "temperature": -1}, "temperature"),
        ("chat/completions", {**CHAT, "top_p": 0}, "top_p"),
        ("chat/completions", {**CHAT, "n": 2}, "n"),
        ("chat/completions", {**CHAT, "stop": [""]}, "stop"),
        ("chat/completions", {**CHAT, "logit_bias": {"9999": 1}}, "logit_bias"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ("chat/completions", {**CHAT, "generation_config": "{}"}, "generation_config"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": 5}, "prompt"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"prompt": "a", "echo": True}, "echo"),
        ("embeddings", {}, "input"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [[]]}, "input"),
        ("embeddings", {"input": ["a", 5]}, "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": [-1]}, "input"),
        ("embeddings", {"input": [2**70]}, "input"),
        ("embeddings", {"input": "a", "messages": MESSAGES}, "input"),
        ("embeddings", {"messages": MESSAGES, "prompt_name": "query"}, "prompt_name"),
        ("embeddings", {**TEXT, "dimensions": 0}, "dimensions"),
        ("embeddings", {**TEXT, "encoding_format": "text"}, "encoding_format"),
        ("embeddings", {**TEXT, "model": 5}, "model"),
        ("embeddings", {**TEXT, "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named(frozen, path, body, param):
    reply = frozen.post(path, body)
    assert reply.status == 400, reply
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["message"].endswith(".")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"input": NaN}', b'{"input": "\\ud800"}', b"[" * 99999]
)
def test_what_is_no_json_is_refused(frozen, raw):
    reply = frozen.post("embeddings", raw)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


def test_another_model_is_not_there(frozen):
    for path, body in (("chat/completions", CHAT), ("embeddings", TEXT), ("completions", {"prompt": "a"})):
        for name in ("gpt-5", "tiny@main", "../etc", "org/model:x.gguf"):
            reply = frozen.post(path, {**body, "model": name})
            assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
        frozen.openai.models.retrieve("gpt-5")
    assert frozen.openai.models.retrieve("tiny").id == "tiny"
    assert [model.id for model in frozen.openai.models.list()] == ["tiny"]


def test_other_paths_and_methods_are_refused_in_the_same_shape(frozen):
    assert frozen.send("GET", "/v1/files").error["message"] == "Not Found."
    assert frozen.send("GET", "/v1/embeddings").status == 405
    for path in ("/load_model", "/reset", "/docs", "/openapi.json"):
        assert frozen.send("POST", path, b"{}").status == 404


def test_what_is_too_long_is_refused_with_the_limit(frozen):
    long = "bread and cheese " * 100
    for path, body, limit, param in (
        ("embeddings", {"input": ["a", long]}, 254, "input"),
        ("embeddings", {"input": [5] * 255}, 254, "input"),
        ("embeddings", {"messages": [{"role": "user", "content": long}]}, 254, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}, 255, "messages"),
        ("completions", {"prompt": long}, 255, "prompt"),
        ("completions", {"prompt": long, "stream": True}, 255, "prompt"),
    ):
        reply = frozen.post(path, body)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (413, param, "context_length_exceeded")
        assert f"room for {limit}" in reply.error["message"]
    assert frozen.post("embeddings", {"input": [5] * 254}).status == 200


def test_a_large_body_is_refused_before_it_is_read(frozen):
    connection = http.client.HTTPConnection("127.0.0.1", frozen.port, timeout=30)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Content-Length", str(100_000_000))
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert "8000000 bytes" in json.loads(response.read())["error"]["message"]
    connection.close()
    pieces = (b"x" * 1_000_000 for _ in range(9))  # without saying how much it is
    connection = http.client.HTTPConnection("127.0.0.1", frozen.port, timeout=30)
    headers = {**AS_JSON, "Transfer-Encoding": "chunked"}
    connection.request("POST", "/v1/embeddings", pieces, encode_chunked=True, headers=headers)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_key_is_asked_for(make_served_model):
    with serving(make_served_model(), ServerOptions(api_key="schlüssel")) as served:
        right = {"Authorization": "Bearer schlüssel".encode().decode("latin-1")}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "schl"}):
            for method, path in (
                ("POST", "/v1/embeddings"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/no"),
            ):
                reply = served.send(method, path, headers=headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert served.send("GET", "/health").status == 200
        assert served.send("POST", "/v1/embeddings", TEXT, right).status == 200


def test_no_host_header_makes_a_route_one_that_needs_no_key(make_served_model, monkeypatch):
    # As Starlette has it before 1.0: the header is put before the path as it was sent.
    monkeypatch.setattr(
        Request, "url", property(lambda self: URL(f"http://{self.headers['host']}{self.scope['path']}"))
    )
    with serving(make_served_model(), ServerOptions(api_key="key")) as served:
        assert served.send("GET", "/v1/models", headers={"Host": "any/health?"}).status == 401


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_page_of_another_site_may_send_is_no_json(frozen, kind):
    reply = frozen.post("embeddings", TEXT, **{"Content-Type": kind})
    assert (reply.status, reply.error["message"]) == (415, "Send JSON, with the header Content-Type: application/json.")
    assert frozen.post("embeddings", TEXT, **{"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_without_a_key_this_machine_answers_to_its_own_names(make_served_model):
    hosts = ServeConfig("gem").hosts
    with serving(make_served_model(), ServerOptions(hosts=hosts)) as served:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", "", "localhost@evil"):
            reply = served.post("embeddings", TEXT, Host=host)
            assert (reply.status, reply.error["code"]) == (403, "wrong_host")
        for host in ("127.0.0.1", f"localhost:{served.port}", "LOCALHOST", "[::1]:8000", "host.docker.internal:8000"):
            assert served.post("embeddings", TEXT, Host=host).status == 200
    assert ServeConfig("gem", api_key="key").hosts is None
    assert ServeConfig("gem", host="0.0.0.0").hosts is None


def test_a_full_queue_says_when_to_ask_again(make_served_model):
    with serving(make_served_model(), ServerOptions(max_queue=2)) as served:
        hold = threading.Event()
        served.server.engine.chat.thread.submit(hold.wait)
        threads = [threading.Thread(target=served.post, args=("embeddings", TEXT)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while served.server.num_places_taken < 2:
            time.sleep(0.01)
        reply = served.post("chat/completions", CHAT)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")
        assert "gem_st_queue 2.0" in served.send("GET", "/metrics").body
        hold.set()
        for thread in threads:
            thread.join()
        assert served.post("embeddings", TEXT).status == 200


def test_while_the_model_is_loaded_the_server_says_so(make_served_model):
    model, go = make_served_model(), threading.Event()

    def load():
        go.wait()
        return Engine(model, "tiny")

    with running(load, model) as served:
        for reply in (served.post("embeddings", TEXT), served.send("GET", "/v1/models")):
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "loading", "1")
        assert served.send("GET", "/health").body == {"status": "loading"}
        go.set()
        while served.send("GET", "/health").status == 503:
            time.sleep(0.01)
        assert served.post("embeddings", TEXT).status == 200


def test_a_failure_of_the_model_is_a_500_without_what_was_sent(frozen, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)

    def fail(*args, **kwargs):
        raise RuntimeError("secret text")

    with monkeypatch.context() as patch:
        patch.setattr(frozen.server.engine.model, "encode", fail)
        patch.setattr(frozen.server.engine.gem.model, "generate", fail)
        replies = [frozen.post("embeddings", {"input": "secret text"}), frozen.post("chat/completions", CHAT)]
        stream = frozen.post("chat/completions", {**CHAT, "stream": True}).body
    assert [reply.status for reply in replies] == [500, 500]
    assert replies[0].error["type"] == "server_error"
    assert '"type":"server_error"' in stream
    assert stream.endswith("data: [DONE]\n\n")
    frozen.wait_for_empty_queue()
    assert frozen.post("embeddings", TEXT).status == 200
    logged = " ".join(record.getMessage() + str(record.exc_info) for record in caplog.records)
    assert "RuntimeError in" in logged
    assert "secret" not in logged + stream + json.dumps([reply.body for reply in replies])


def test_nothing_of_a_request_is_logged_but_its_size(frozen, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    body = {"messages": [{"role": "user", "content": "secret question"}], "max_tokens": 2}
    for path, sent in (("chat/completions", body), ("embeddings", {"input": "secret"}), ("embeddings", b"secret {")):
        frozen.post(path, sent, Authorization="Bearer secret")
    frozen.send("GET", "/secret?secret=secret")
    frozen.post("chat/completions", {**body, "model": "secret"})
    lines = [record.getMessage() for record in caplog.records]
    assert any(f"{len(json.dumps(body))} bytes" in line for line in lines)
    out, err = capfd.readouterr()
    assert "secret" not in "\n".join(lines) + out + err


NUM_BODIES = int(os.environ.get("GEM_ST_BODIES", "400"))
FIELDS = {*ChatBody.model_fields, *CompletionBody.model_fields, *EmbeddingBody.model_fields, *Message.model_fields}
NAMES = st.sampled_from(sorted(FIELDS))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
WRONG = st.sampled_from(["tiny2", 5, None, [], {}, "", -1, True, "\x00"])


def spoil(path: str, name: str, value: object) -> dict[str, object]:
    """A body with something in it that is wrong whatever the rest is."""
    good = {"chat/completions": CHAT, "completions": {"prompt": "a", "max_tokens": 2}, "embeddings": TEXT}[path]
    return {**good, name: value, "no such field": value}


@settings(max_examples=NUM_BODIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["chat/completions", "completions", "embeddings"]),
    body=st.binary(max_size=40) | JSON | st.builds(lambda n, v: (n, v), NAMES, WRONG | JSON),
)
def test_malformed_bodies_are_refused(frozen, path, body):
    sent = spoil(path, *body) if isinstance(body, tuple) else body
    if isinstance(sent, dict) and not isinstance(body, tuple):
        sent = {**sent, "no such field": 1}
    reply = frozen.post(path, sent)
    assert 400 <= reply.status < 500, (sent, reply)
    assert reply.error["message"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["chat/completions", "completions", "embeddings"]), name=NAMES, value=WRONG | JSON)
def test_any_value_of_a_field_is_answered_or_refused(frozen, path, name, value):
    good = {"chat/completions": CHAT, "completions": {"prompt": "a", "max_tokens": 2}, "embeddings": TEXT}[path]
    reply = frozen.post(path, {**good, name: value})
    assert reply.status == 200 or 400 <= reply.status < 500, (name, value, reply)


@pytest.fixture
def many_files():
    """Both ends of a thousand connections are files of this process."""
    resource = pytest.importorskip("resource", reason="limits of files are those of Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"This process may have {hard} files, and needs 4,096.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_say_nothing_or_half_of_it_hold_nobody_up(frozen, many_files):
    idle = [socket.create_connection(("127.0.0.1", frozen.port)) for _ in range(1000)]
    slow = idle[0]
    slow.sendall(HEAD + b'{"inp')
    assert frozen.post("embeddings", TEXT).status == 200
    slow.sendall(b'ut": "a"}')
    assert b"200 OK" in slow.recv(1000)
    for connection in idle:
        connection.close()
    idle = socket.create_connection(("127.0.0.1", frozen.port))
    idle.sendall(HEAD + b"{")
    idle.close()  # in the middle of its body
    assert frozen.post("embeddings", TEXT).status == 200


def test_the_server_is_alive_after_all_of_it(frozen):
    frozen.wait_for_empty_queue()
    assert frozen.send("GET", "/health").body == {"status": "ok"}
    assert frozen.post("embeddings", TEXT).status == 200
    metrics = frozen.send("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'gem_st_requests_total{route="/v1/embeddings",status="400"}' in metrics.body
