"""Every option of `generate` does what it does in stock transformers, wherever it is given."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gem_st import GemTransformer

PROMPT = "Once upon a time"
GEM_TOKENS = [400, 401]
PLAIN = {"do_sample": False, "max_new_tokens": 12}
OPTIONS = {
    "suppress_tokens": {"suppress_tokens": list(range(2, 300))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(100, 390))},
    "bad_words_ids": {"bad_words_ids": [[row] for row in range(2, 300)]},
    "sequence_bias": {"sequence_bias": [[[60], 50.0]]},
    "repetition_penalty": {"repetition_penalty": 0.05},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "sequence_bias": [[[60], 50.0]]},
    "min_new_tokens": {"min_new_tokens": 3, "eos_token_id": list(range(2, 300))},
    "eos_token_id": {"eos_token_id": list(range(2, 390, 3))},
    "forced_eos_token_id": {"forced_eos_token_id": 77},
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "beams": {"num_beams": 3, "length_penalty": 0.3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 5},
    "nucleus": {"do_sample": True, "temperature": 0.7, "top_p": 0.6, "top_k": 0},
    "exponential decay": {"exponential_decay_length_penalty": (2, 50.0)},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "stop_strings": {"stop_strings": ["rm", "zz"]},
    "padding": {"pad_token_id": 5, "eos_token_id": list(range(2, 390, 3))},
}


def stock_texts(model, tokenizer, prompt, **options) -> list[str]:
    """What transformers writes: the new text of each sequence, up to its end token."""
    ids = tokenizer(prompt, return_tensors="pt")
    hide = [lambda _, scores: scores.index_fill(1, torch.tensor(GEM_TOKENS), -torch.inf)]
    output = model.generate(**ids, tokenizer=tokenizer, **{"pad_token_id": 1, "logits_processor": hide, **options})
    config = options.get("generation_config") or model.generation_config
    given = options.get("eos_token_id", config.eos_token_id)
    eos = torch.as_tensor(model.generation_config.eos_token_id if given is None else given).reshape(-1)
    texts = []
    for row in output[:, ids["input_ids"].shape[1] :]:
        ends = torch.isin(row, eos).nonzero()
        texts.append(tokenizer.decode(row[: ends[0]] if len(ends) else row, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("place", ["keywords", "generation_config", "the base's own", "with a cache"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_do_what_they_do_in_stock_transformers(make_base, tmp_path, options, place):
    name = next(iter(options))
    options = {"do_sample": False, "max_new_tokens": 12, **options}
    folder = shutil.copytree(make_base(vocab_size=402), tmp_path / "base")
    kwargs = options
    if place == "generation_config":
        kwargs = {"generation_config": GenerationConfig(**options)}
    elif place == "the base's own":
        kwargs = {}
        GenerationConfig(**{"eos_token_id": 1, "bos_token_id": 0, **options}).save_pretrained(folder)
    torch.manual_seed(1)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    gem = GemTransformer(str(folder), num_gem_tokens=2)
    torch.manual_seed(3)
    expected = stock_texts(base, tokenizer, PROMPT, **kwargs)
    torch.manual_seed(3)
    if place == "with a cache":
        if "prompt_lookup_num_tokens" in options:
            pytest.skip("refused with a cache")
        written = gem.generate(cache=gem.prefill(PROMPT), **kwargs)
    else:
        written = gem.generate(PROMPT, **kwargs)
    assert gem.gem_token_ids == GEM_TOKENS
    assert ([written] if isinstance(written, str) else written) == expected
    if name not in ("pad_token_id", "prompt_lookup_num_tokens"):  # an option that changes nothing would test nothing
        plain = AutoModelForCausalLM.from_pretrained(make_base(vocab_size=402))
        assert expected != stock_texts(plain, tokenizer, PROMPT, **PLAIN)


def test_an_end_token_of_the_model_ends_the_text_under_a_given_configuration(make_base):
    gem = GemTransformer(str(make_base()))
    plain = gem.generate(PROMPT, **PLAIN, eos_token_id=None)
    gem.model.generation_config.eos_token_id = list(range(2, 390, 3))
    ended = gem.generate(PROMPT, **PLAIN)
    assert plain.startswith(ended)
    assert plain != ended
    assert gem.generate(PROMPT, generation_config=GenerationConfig(**PLAIN)) == ended
    assert gem.generate(PROMPT, **PLAIN, eos_token_id=None) == plain


def test_processors_of_the_caller_run_and_none_of_them_brings_a_gem_token_back(make_base):
    gem = GemTransformer(str(make_base()), num_gem_tokens=2)
    favoured = torch.tensor([*gem.gem_token_ids, 7])
    kwargs = {"logits_processor": [lambda _, scores: scores.index_fill(1, favoured, 100.0)], "suppress_tokens": [8]}
    assert gem.generate(PROMPT, **PLAIN, **kwargs) == gem.tokenizer.decode([7] * 12)


@pytest.mark.parametrize("settings", [{"num_gem_tokens": 2}, {"num_gem_tokens": 2, "freeze_base": True}])
def test_rows_stop_at_their_own_string_and_what_was_written_is_kept(make_base, settings):
    gem = GemTransformer(str(make_base()), **settings)
    prompts = [PROMPT, "It rained", "Tom had a"]
    plain = gem.generate(prompts, **PLAIN)
    stops = [next(letter for letter in text[number:] if letter.isascii()) for number, text in enumerate(plain)]
    expected = [text[: min(text.index(stop) for stop in stops if stop in text) + 1] for text in plain]
    assert gem.generate(prompts, **PLAIN, stop_strings=stops) == expected
    texts, cache = gem.generate(prompts, **PLAIN, stop_strings=stops, return_cache=True)
    assert texts == expected
    assert gem.generate(cache=gem.prefill(prompts), **PLAIN, stop_strings=stops[0])[0] == expected[0]
    rows = [ids[mask] for ids, mask in zip(cache.input_ids, cache.attention_mask, strict=True)]
    for row, prompt, text in zip(rows, prompts, expected, strict=True):
        assert gem.tokenizer.decode(row, skip_special_tokens=True) == prompt + text
