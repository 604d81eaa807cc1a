"""The command: from a checkpoint on the disk to a server, and to its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from openai import APIConnectionError, APIStatusError, OpenAI
from typer.testing import CliRunner

import gem_st.cli.serve as serve_command
from gem_st.cli import app
from gem_st.serving.run import ServeConfig, load_engine

from ..conftest import ROOT
from .served import AS_JSON, MESSAGES


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def command(folder, port: int, *options: str) -> Iterator[tuple[subprocess.Popen, OpenAI]]:
    """The command, when it is ready, and a client of it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GEM_ST_API_KEY": "key"}
    arguments = [sys.executable, "-m", "gem_st.cli", "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0)
    try:
        while True:
            try:
                assert [served.id for served in client.models.list()] == ["gem"]
                break
            except (APIConnectionError, APIStatusError):
                assert process.poll() is None, process.stdout.read().decode()
                time.sleep(0.1)
        yield process, client
    finally:
        process.kill()


def test_a_checkpoint_is_served_is_killed_and_is_served_until_a_signal_lets_requests_finish(
    make_served_model, tmp_path
):
    model, port = make_served_model(freeze_base=True), free_port()
    model.save(str(tmp_path / "gem"))
    long = {"model": "gem", "messages": MESSAGES, "max_tokens": 150}
    with command(tmp_path / "gem", port, "--cache-gib", "0.01", "--continuous-batching") as (process, client):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {**AS_JSON, "Authorization": "Bearer key"}
        connection.request("POST", "/v1/chat/completions", json.dumps({**long, "stream": True}), headers)
        response = connection.getresponse()
        response.readline()
        process.kill()
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            response.read()
        with pytest.raises(APIConnectionError):
            client.embeddings.create(model="gem", input="bread")
    with command(tmp_path / "gem", port, "--cache-gib", "0.01") as (process, client):
        vector = client.embeddings.create(model="gem", input="bread").data[0].embedding
        np.testing.assert_allclose(vector, model.encode("bread"), atol=1e-4)
        stream = client.chat.completions.create(**long, logit_bias={"1": -100}, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].usage.completion_tokens == 150
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "gem is ready" in output
    assert "village" not in output


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_answers_in_batches_are_finished_when_told_to_stop_and_not_when_told_twice(
    make_served_model, tmp_path, signals
):
    model, port = make_served_model(freeze_base=True), free_port()
    model.save(str(tmp_path / "gem"))
    with command(tmp_path / "gem", port, "--cache-gib", "0.01", "--continuous-batching") as (process, client):
        stream = client.chat.completions.create(model="gem", messages=MESSAGES, max_tokens=150, stream=True)
        next(iter(stream))
        for one in signals:
            process.send_signal(one)
            time.sleep(0.05)
        if len(signals) == 1:
            assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
        process.communicate(timeout=30)
    assert process.returncode in (0, 1, 130, -signals[0])


@pytest.mark.parametrize("what", ["folder", "stock"])
def test_what_is_no_checkpoint_ends_in_one_line(what, tmp_path, make_base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path if what == "folder" else make_base()
    done = CliRunner().invoke(app, ["serve", str(path), "--port", str(free_port())])
    assert done.exit_code == 1
    assert "is not a GEM checkpoint" in done.output


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(serve_command, "NEEDED", ("fastapi", "no_such_package"))
    done = CliRunner().invoke(app, ["serve", "any"])
    assert done.exit_code == 1
    assert "no_such_package is not installed: pip install 'gem-st[serve]'" in done.output
    monkeypatch.setattr(serve_command, "NEEDED", ())
    monkeypatch.setattr(serve_command, "OLDEST_TRANSFORMERS", "99.0")
    assert "needs transformers 99.0 or later" in " ".join(CliRunner().invoke(app, ["serve", "any"]).output.split())


def test_code_of_a_checkpoint_needs_trust(make_served_model, tmp_path):
    make_served_model().save(str(tmp_path))
    with (tmp_path / "gem_st.py").open("a") as file:
        file.write("\nraise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match="would run code that is not gem_st's"):
        load_engine(ServeConfig(str(tmp_path)))


def test_settings_out_of_range_are_refused(tmp_path):
    for name, value in (("cache_gib", -1), ("max_queue", 0), ("batch_tokens", 0), ("embed_slice_ms", -1)):
        with pytest.raises(ValueError, match=f"{name}="):
            ServeConfig("any", **{name: value})
    with pytest.raises(ValueError, match="API key is empty"):
        ServeConfig("any", api_key="")
    assert ServeConfig("org/name").model_name == "org/name"
    assert ServeConfig(str(tmp_path)).model_name == tmp_path.name
    assert ServeConfig("org/name", name="mine").model_name == "mine"
