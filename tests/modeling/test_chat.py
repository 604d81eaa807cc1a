"""Chat messages: what the template is told, and what it renders, is what stock transformers makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.utils import logging

from gem_st import GemTransformer

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking is defined and not enable_thinking %} <think></think>{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What is at the market?"}]
OTHER = [{"role": "user", "content": "It rained."}, {"role": "assistant", "content": "All day"}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
TOOL = {"type": "function", "function": {"name": "buy", "description": "Buys.", "parameters": {"type": "object"}}}
OPTIONS = {
    "nothing": {},
    "no thinking": {"enable_thinking": False},
    "tools": {"tools": [TOOL]},
    "no start of an answer": {"add_generation_prompt": False},
    "the last message goes on": {"continue_final_message": True},
    "another template": {"chat_template": "{{ messages[0]['content'] }} -"},
}


@pytest.mark.parametrize("settings", [{"num_gem_tokens": 2}, {"freeze_base": True}], ids=["full", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_template(make_base, options, settings):
    gem = GemTransformer(str(make_base(chat_template=TEMPLATE)), **settings)
    stock = {"add_generation_prompt": "continue_final_message" not in options, **options}
    ids = [gem.tokenizer.apply_chat_template(chat, **stock)["input_ids"] for chat in (MESSAGES, OTHER)]
    kwargs = {"chat_template_kwargs": options}
    cache = gem.prefill([MESSAGES, OTHER], **kwargs)
    assert [row[mask].tolist() for row, mask in zip(cache.input_ids, cache.attention_mask, strict=True)] == ids
    torch.testing.assert_close(gem.embed(cache), gem.embedder.embed_ids(ids), atol=1e-5, rtol=1e-5)
    assert gem.compress([MESSAGES, OTHER], **kwargs).lengths.tolist() == list(map(len, ids))

    expected = gem.generate(cache=cache, **GREEDY)
    assert gem.generate([MESSAGES, OTHER], **GREEDY, **kwargs) == expected
    assert gem.generate(MESSAGES, **GREEDY, **kwargs) == expected[0]
    row = torch.tensor([ids[0]])
    output = gem.model.generate(row, attention_mask=torch.ones_like(row), **GREEDY, pad_token_id=1)
    assert expected[0] == gem.base.text.decode_continuation(output[0], row.shape[1])


def test_the_options_tell_prompts_apart(make_base):
    gem = GemTransformer(str(make_base(chat_template=TEMPLATE)))
    rows = [gem.prefill(MESSAGES, chat_template_kwargs=options).input_ids[0].tolist() for options in OPTIONS.values()]
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_options_that_no_template_sees_are_refused(make_base):
    gem = GemTransformer(str(make_base(chat_template=TEMPLATE)))
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    for read in (gem.prefill, gem.compress, gem.generate):
        with pytest.raises(ValueError, match="chat_template_kwargs were given, but plain text"):
            read(["It rained"], **kwargs)
    with pytest.raises(ValueError, match="prompt='query: ' is put before texts"):
        gem.prefill(MESSAGES, prompt="query: ")
    cache = gem.prefill("It rained")
    for read in (lambda: gem.compress(cache, **kwargs), lambda: gem.generate(cache=cache, **kwargs)):
        with pytest.raises(ValueError, match="chat_template_kwargs were given with a cache"):
            read()


def test_a_template_of_its_own_needs_none_of_the_tokenizers(make_base):
    gem = GemTransformer(str(make_base()))
    kwargs = {"chat_template_kwargs": {"chat_template": "{{ messages[0]['content'] }}"}}
    assert gem.tokenizer.decode(gem.prefill(MESSAGES, **kwargs).input_ids[0]) == MESSAGES[0]["content"]
    with pytest.raises(ValueError, match="no chat template"):
        gem.prefill(MESSAGES)


@pytest.fixture
def warned_of(warnings_of_transformers):
    """Function that tells how often a call warned of a second BOS."""

    def count(call) -> int:
        logging.get_logger().warning_once.cache_clear()
        warnings_of_transformers.clear()
        call()
        return warnings_of_transformers.text.count("A text begins with '<bos>'")

    return count


def test_text_that_a_template_rendered_gets_a_second_bos_and_a_warning(make_model, warned_of):
    model = make_model(chat_template="<bos>" + TEMPLATE)
    gem = model[0]
    rendered = gem.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert gem.preprocess([rendered])["input_ids"][0, :2].tolist() == [0, 0]  # as the tokenizer has it
    assert gem.prefill(rendered).input_ids[0].tolist() == gem.tokenizer(rendered)["input_ids"]

    def generate(prompts):
        return gem.generate(prompts, **GREEDY)

    for read in (model.encode, gem.prefill, generate, gem.compress):
        assert warned_of(lambda read=read: read([rendered, "It rained"])) == 1
        assert warned_of(lambda read=read: read(["It rained", "a <bos> b"])) == 0
    for read in (gem.prefill, generate, gem.compress):
        assert warned_of(lambda read=read: read(MESSAGES)) == 0
    assert gem.prefill(MESSAGES).input_ids[0].tolist().count(0) == 1
    assert warned_of(lambda: gem.extend(gem.prefill("It rained"), "<bos>")) == 0
