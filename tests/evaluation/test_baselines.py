"""Baselines, against hidden states computed by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from gem_st.evaluation.baselines import BASELINES, build_baseline

from ..conftest import CORPUS


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_by_hand(make_base: Callable[..., Path], name: str, architecture: str) -> None:
    base = str(make_base(architecture))
    vectors = build_baseline(name, base).encode(CORPUS[:3], convert_to_tensor=True, batch_size=3).cpu()
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    for text, vector in zip(CORPUS, vectors, strict=False):
        ids = tokenizer(text)["input_ids"]
        row = [*ids, *ids[1:]] if name == "echo" else ids
        with torch.no_grad():
            states = model(torch.tensor([row])).last_hidden_state[0]
        expected = {"mean": states.mean(0), "lasttoken": states[-1], "echo": states[len(ids) :].mean(0)}[name]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_the_second_reading_knows_what_comes_later(make_base: Callable[..., Path]) -> None:
    model = build_baseline("echo", str(make_base()))
    features = model.preprocess(["the sea", "the village by the sea"])
    assert features["echo_mask"].sum(1).tolist() == [(n - 1) // 2 for n in features["attention_mask"].sum(1).tolist()]
    output = model[0](dict(features))
    assert output["attention_mask"].equal(features["echo_mask"])


@pytest.mark.parametrize(("name", "longest"), [("mean", 256), ("echo", 128)])
def test_long_texts_are_cut_to_what_the_base_can_read(make_base: Callable[..., Path], name: str, longest: int) -> None:
    model = build_baseline(name, str(make_base("gpt_neo")))
    assert model.max_seq_length == longest
    whole, longer = model.encode(["a long text " * 400, "a long text " * 500], convert_to_tensor=True)
    assert torch.equal(whole, longer)
    assert build_baseline(name, str(make_base("gpt_neo")), max_seq_length=20).max_seq_length == 20


def test_a_chat_template_changes_nothing(make_base: Callable[..., Path]) -> None:
    template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Bot:"
    plain, chat = (build_baseline("mean", str(make_base(chat_template=t))) for t in (None, template))
    assert plain.encode(CORPUS[:2], convert_to_tensor=True).equal(chat.encode(CORPUS[:2], convert_to_tensor=True))


def test_an_unknown_baseline(make_base: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"no baseline 'max'\. Known are mean, lasttoken, echo"):
        build_baseline("max", str(make_base()))
