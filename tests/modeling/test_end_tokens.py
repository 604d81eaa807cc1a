"""Tokenizers that end every text in a token: it is embedded with it, and continued without it."""

from __future__ import annotations

import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st import GemTransformer

from ..conftest import CORPUS

GREEDY = {"max_new_tokens": 6, "do_sample": False}
TEXTS = ["It rained", CORPUS[0], "Tom had a"]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def use_template(single):
    def change(tokenizer):
        special = [("<bos>", 0), ("<eos>", 1)]
        template = processors.TemplateProcessing(single=single, special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = template

    return change


def add_eos(tokenizer):
    tokenizer.add_bos_token = tokenizer.add_eos_token = True


ENDS = {
    "as Qwen3-Embedding": (use_template("$A <eos>"), 1),
    "both ends": (use_template("<bos> $A <eos>"), 1),
    "two tokens": (use_template("<bos> $A <eos> <bos>"), 2),
    "add_eos_token": (add_eos, 1),
}


@pytest.fixture(params=ENDS.values(), ids=ENDS)
def base_and_end(request, make_base, tmp_path):
    change, num_end = request.param
    folder = shutil.copytree(make_base(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder, num_end


@pytest.mark.parametrize("settings", [{}, {"num_gem_tokens": 3, "freeze_base": True}], ids=["full", "frozen"])
def test_prompts_end_where_the_text_ends_and_embeddings_keep_the_rule(base_and_end, settings):
    folder, num_end = base_and_end
    gem = GemTransformer(str(folder), **settings)
    model = SentenceTransformer(modules=[gem], device="cpu")
    tokenizer, base = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = tokenizer(TEXTS)["input_ids"]
    assert rows[0][-num_end:] == gem.base.text.end_ids
    assert gem.preprocess(TEXTS[:1])["input_ids"][0].tolist() == [*rows[0], *gem.gem_token_ids]

    expected = []
    for row in rows:
        ids = torch.tensor([row[:-num_end]])
        output = base.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, pad_token_id=1)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    cache = gem.prefill(TEXTS)
    assert gem.generate(TEXTS, **GREEDY) == expected
    assert gem.generate(cache=cache, **GREEDY) == expected

    vectors = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(gem.embed(cache), vectors, atol=1e-5, rtol=1e-5)
    begun = gem.extend(gem.prefill("It"), " rained")
    torch.testing.assert_close(gem.embed(begun), vectors[:1], atol=1e-5, rtol=1e-5)
    assert gem.compress(TEXTS).lengths.tolist() == [len(row) for row in rows]


def test_a_reconstruction_is_as_long_as_the_text(base_and_end, monkeypatch):
    gem = GemTransformer(str(base_and_end[0]))
    lengths = []
    monkeypatch.setattr(gem.tokenizer, "decode", lambda row, **_: lengths.append(len(row)) or "")
    assert gem.reconstruct(gem.compress(TEXTS), eos_token_id=None) == ["", "", ""]
    assert lengths == [len(row) for row in gem.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]


def test_what_was_written_is_embedded_as_a_text_with_its_end(base_and_end):
    folder, _ = base_and_end
    gem = GemTransformer(str(folder), num_gem_tokens=2)
    _, cache = gem.generate(TEXTS[0], **GREEDY, return_cache=True)
    ids = cache.input_ids[0][cache.attention_mask[0]].tolist() + gem.base.text.end_ids
    torch.testing.assert_close(gem.embed(cache), gem.embedder.embed_ids([ids]), atol=1e-5, rtol=1e-5)


def test_truncation_leaves_a_place_for_the_end(base_and_end):
    folder, num_end = base_and_end
    gem = GemTransformer(str(folder), num_gem_tokens=2, max_seq_length=12)
    model = SentenceTransformer(modules=[gem], device="cpu")
    cache = gem.prefill(CORPUS[:2])
    assert cache.lengths.tolist() == [10 - num_end] * 2
    torch.testing.assert_close(gem.embed(cache), model.encode(CORPUS[:2], convert_to_tensor=True), atol=1e-5, rtol=1e-5)
    assert gem.prefill([[{"role": "user", "content": CORPUS[0]}]]).lengths.tolist() == [10 - num_end]
