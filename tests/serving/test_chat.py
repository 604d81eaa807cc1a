"""Chat and completion: the answers of the untouched base, streamed or not, and embeddings in between."""

from __future__ import annotations

import http.client
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cli.serving.utils import parse_assistant_message
from transformers.generation import stopping_criteria

from gem_st.serving.chat import forgive

from .served import AS_JSON, MESSAGES, serving

NO_END = {"1": -100}
"""Has no end token written."""
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "logit_bias": NO_END}


def stock_answer(served, make_base, messages, num_new, architecture="llama"):
    """What transformers' own generation gives, on the base as it lies on the disk."""
    from ..modeling.test_gem_generator import CHAT

    base = AutoModelForCausalLM.from_pretrained(make_base(architecture, chat_template=CHAT))
    tokenizer = served.model.tokenizer
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = base.generate(**inputs, max_new_tokens=num_new, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_greedy_answers_are_those_of_the_stock_base(mode, request, make_base):
    served = request.getfixturevalue(mode)
    for text in ("Hello there", "The fisherman took his boat", "It rained all day, and the children"):
        messages = [{"role": "user", "content": text}]
        done = served.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
        assert done.choices[0].message.content == stock_answer(served, make_base, messages, 24)
        assert done.choices[0].finish_reason == ("length" if done.usage.completion_tokens == 24 else "stop")


def test_answers_with_a_sliding_window_are_those_of_the_stock_base(make_served_model, make_base):
    with serving(make_served_model("mistral", freeze_base=True)) as served:
        for _ in range(2):  # the second time from the cache
            done = served.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16)
            assert done.choices[0].message.content == stock_answer(served, make_base, MESSAGES, 16, "mistral")


def test_completions_are_those_of_generate(frozen):
    text = "Once upon a time there was"
    done = frozen.openai.completions.create(model="tiny", prompt=text, max_tokens=12)
    ids = frozen.model.tokenizer(text, return_tensors="pt")
    output = frozen.model[0].model.generate(**ids, max_new_tokens=12)
    expected = frozen.model.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.choices[0].text == expected
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (ids["input_ids"].shape[1], 12)
    assert done.model == "tiny"
    parts = frozen.openai.completions.create(model="tiny", prompt=[text], max_tokens=12, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_a_stream_gives_the_same_answer_and_ends_as_clients_expect(frozen):
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20}
    whole = frozen.openai.chat.completions.create(**options)
    parts = list(frozen.openai.chat.completions.create(**options, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    # Streamed bytes are decoded as they come, and half a character at the end is dropped.
    assert whole.choices[0].message.content.startswith(text.rstrip("\ufffd"))
    assert len(text) > 4
    assert parts[-1].usage == whole.usage
    assert parts[-1].choices[0].finish_reason == "length"
    raw = frozen.post("chat/completions", {**options, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.body.endswith("data: [DONE]\n\n")


def test_options_reach_generation(frozen):
    answers = set()
    for seed in range(4):
        config = frozen.model[0].model.generation_config
        config.do_sample = True
        try:
            done = frozen.openai.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=8, temperature=1.5, top_p=0.9, seed=seed, user="me"
            )
        finally:
            config.do_sample = False
        answers.add(done.choices[0].message.content)
    assert len(answers) > 1
    biased = frozen.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=3, logit_bias={"20": 100}
    )
    assert biased.choices[0].message.content == frozen.model.tokenizer.decode([20] * 3)


def test_tools_and_their_calls_reach_the_template(make_served_model):
    model = make_served_model(freeze_base=True)
    model.tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
        "{{ m.content }}\n{% endfor %}{{ mood }}"
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Hot?", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "30"},
    ]
    expected = "[weather]user:Hot?\nassistant:weather(Rome)\ntool:30\nsunny"
    with serving(model) as served:
        done = served.openai.chat.completions.create(
            model="tiny",
            messages=messages,
            tools=[tool],
            tool_choice="auto",
            max_tokens=1,
            extra_body={"chat_template_kwargs": {"mood": "sunny"}},
        )
        ids = model.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert done.usage.prompt_tokens == len(ids)
        broken = {**call, "function": {"name": "weather", "arguments": "{"}}
        reply = served.post("chat/completions", {"messages": [{**messages[1], "tool_calls": [broken]}]})
        assert (reply.status, reply.error["param"]) == (400, "messages")


def test_an_answer_ends_where_the_context_does(frozen):
    done = frozen.openai.chat.completions.create(model="tiny", messages=MESSAGES, logit_bias=NO_END)
    assert done.usage.total_tokens == 256
    assert done.choices[0].finish_reason == "length"


def test_a_conversation_that_goes_on_is_not_read_again(make_served_model):
    model = make_served_model(freeze_base=True, num_gem_tokens=2)
    going_on = [*MESSAGES, {"role": "assistant", "content": "The fisherman."}, {"role": "user", "content": "Why?"}]
    with serving(model) as served, serving(model, cache_bytes=0) as forgetful:
        replies = []
        for messages in (MESSAGES, MESSAGES, going_on):
            body = {"messages": messages, "max_tokens": 8}
            replies.append(served.post("chat/completions", body))
            cold = forgetful.post("chat/completions", body)
            assert replies[-1].body["choices"] == cold.body["choices"]
            assert "x-gem-reused-tokens" not in cold.headers
        reused = [int(reply.headers["x-gem-reused-tokens"]) for reply in replies]
        num_prompt = replies[0].body["usage"]["prompt_tokens"]
        assert reused[:2] == [0, num_prompt - 1]  # the last token is read again, for its logits
        assert reused[2] >= num_prompt - 1
        # What was chatted is there to be embedded, at the price of what is new.
        embedded = served.post("embeddings", {"messages": going_on})
        assert int(embedded.headers["x-gem-reused-tokens"]) >= replies[2].body["usage"]["prompt_tokens"] - 10
        metrics = served.send("GET", "/metrics").body
        assert 'gem_st_cache_lookups_total{result="hit"} 3.0' in metrics


def test_embeddings_are_served_between_decoding_steps(frozen):
    connection = http.client.HTTPConnection("127.0.0.1", frozen.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": True}), AS_JSON)
    response = connection.getresponse()
    response.readline()
    num_embedded = 0
    while frozen.server.num_places_taken:
        reply = frozen.post("embeddings", {"input": f"text {num_embedded}"})
        assert reply.status == 200
        num_embedded += frozen.server.num_places_taken  # while the chat is still going on
        if num_embedded >= 3:
            break
    rest = response.read()
    connection.close()
    assert num_embedded >= 3
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"completion_tokens":150' in rest


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(frozen, stream, monkeypatch):
    frozen.wait_for_empty_queue()
    steps = []
    engine, let_in = frozen.server.engine, frozen.server.engine.let_embeddings_in

    def slowly():
        steps.append(None)
        time.sleep(0.02)
        let_in()

    monkeypatch.setattr(engine, "let_embeddings_in", slowly)
    connection = http.client.HTTPConnection("127.0.0.1", frozen.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": stream}), AS_JSON)
    while len(steps) < 3:
        time.sleep(0.01)
    connection.close()
    frozen.wait_for_empty_queue()
    assert frozen.post("embeddings", {"input": "still here"}).status == 200
    assert len(steps) < 100
    assert not engine.chat.turns


def test_what_a_hung_up_client_asked_for_is_not_embedded(frozen, monkeypatch):
    frozen.wait_for_empty_queue()
    engine, embedded, encode = frozen.server.engine, [], frozen.model.encode

    def noting(texts, **kwargs):
        embedded.extend(texts)
        return encode(texts, **kwargs)

    monkeypatch.setattr(engine.model, "encode", noting)
    hold = threading.Event()
    engine.chat.thread.submit(hold.wait)
    connection = http.client.HTTPConnection("127.0.0.1", frozen.port, timeout=60)
    connection.request("POST", "/v1/embeddings", json.dumps({"input": "gone"}), AS_JSON)
    while not engine._embeddings:
        time.sleep(0.01)
    connection.close()
    frozen.wait_for_empty_queue()
    hold.set()
    assert frozen.post("embeddings", {"input": "here"}).status == 200
    assert embedded == ["here"]


def test_a_prompt_cannot_spell_a_token_that_was_trained_to_embed(make_served_model):
    model = make_served_model(num_reserved=4)
    name = model.tokenizer.convert_ids_to_tokens(model[0].gem_token_ids[0])
    with serving(model) as served:
        refused = served.post("completions", {"prompt": f"Hello {name} there", "max_tokens": 2})
        assert (refused.status, refused.error["param"]) == (400, "prompt")
        assert "spells the name of a GEM token" in refused.error["message"]
        assert served.post("embeddings", {"input": f"Hello {name} there"}).status == 200  # as ordinary text


def test_the_weights_are_there_once(frozen):
    gem = frozen.model[0]
    handler = frozen.server.engine.chat._chat
    model, tokenizer = handler.model_manager.load_model_and_processor("any-name")
    assert model is gem.model
    assert tokenizer._tokenizer is gem.tokenizer._tokenizer
    assert handler.model_manager.loaded_models == {}
    with torch.no_grad():
        names = {tensor.data_ptr() for tensor in gem.model.parameters()}
    assert names <= {tensor.data_ptr() for tensor in gem.parameters()}


def test_a_stop_ends_the_answer_where_it_is_written(frozen):
    def ask(**options: Any) -> Any:
        given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, **options}
        return frozen.openai.chat.completions.create(**given).choices[0]

    num_tables = len(stopping_criteria.STOP_STRING_EMBEDDING_CACHE)
    whole = ask().message.content
    stop = next(whole[start : start + 6] for start in range(4, 40) if "\ufffd" not in whole[start : start + 6])
    done = ask(stop=["a" * 256, stop])
    end = whole.index(stop) + 6
    assert done.finish_reason == "stop"
    assert done.message.content.startswith(whole[:end])
    assert len(done.message.content) < end + 12  # the rest of one token
    assert ask(stop="a" * 256).message.content == whole
    assert len(stopping_criteria.STOP_STRING_EMBEDDING_CACHE) == num_tables


@pytest.mark.parametrize(
    ("text", "num_calls"),
    [
        ('<tool_call>\n{"name": "find", "arguments": {"what": "bread"}}\n</tool_call>', 1),
        ('<tool_call>\n{"name": "find", "argu', 0),
        ('<tool_call>\n{"nothing": 1}\n</tool_call>', 0),
        ("<tool_call> is what a call begins with.<eos>", 0),
    ],
)
def test_half_a_call_of_a_tool_is_text(frozen, text, num_calls):
    tokenizer = forgive(frozen.model.tokenizer)
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
    content, _, calls = parse_assistant_message(tokenizer, model, ids, [0])
    assert len(calls or []) == num_calls
    assert "tool_call" not in content if num_calls else content == text.removesuffix("<eos>")
