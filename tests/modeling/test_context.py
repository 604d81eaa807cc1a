"""Where the positions of a model end: text stops there, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gem_st import GemTransformer

from ..conftest import ARCHITECTURES, CORPUS, SIZES, build_tokenizer

CONTEXT = 48
NAMES = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GPT = {**NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
OPT = {**NAMES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
SHORT = {"vocab_size": 400, "max_position_embeddings": CONTEXT}
LEARNED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)),  # a table of rotations
    "gpt_neo": lambda: ARCHITECTURES["gpt_neo"](**SHORT),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, word_embed_proj_dim=32, max_position_embeddings=CONTEXT)),
}
COMPUTED = {
    **{name: lambda name=name: ARCHITECTURES[name](vocab_size=400) for name in ("llama", "mistral", "gemma3")},
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16)),
}
OPEN = {"do_sample": False, "eos_token_id": None}
TEXT = " ".join(CORPUS)


def load(folder, make_model, **settings) -> GemTransformer:
    torch.manual_seed(0)
    make_model().save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder)
    return GemTransformer(str(folder), **settings)


@pytest.fixture(params=LEARNED.values(), ids=LEARNED)
def gem(request, tmp_path):
    return load(tmp_path, request.param)


def texts_of(gem, *lengths: int) -> list[str]:
    """Texts of so many tokens, BOS included."""
    ids = gem.tokenizer(TEXT)["input_ids"]
    texts = [gem.tokenizer.decode(ids[1:length]) for length in lengths]
    assert [len(row) for row in gem.base.text.encode(texts)] == list(lengths)
    return texts


@pytest.mark.parametrize("make_model", [*LEARNED.values(), *COMPUTED.values()], ids=[*LEARNED, *COMPUTED])
def test_places_in_a_table_are_counted(tmp_path, make_model):
    positions = load(tmp_path, make_model).facts.num_positions
    assert positions == (CONTEXT if make_model in LEARNED.values() else float("inf"))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("source", ["prompts", "cache"])
@pytest.mark.parametrize("options", [{"max_new_tokens": 20}, {}, {"max_length": 100}], ids=["20", "default", "length"])
def test_text_stops_at_the_context(gem, tmp_path, options, source):
    lengths = (CONTEXT - 5, 8, CONTEXT - 1, CONTEXT - 5)
    texts = texts_of(gem, *lengths)
    given = {"prompts": texts} if source == "prompts" else {"cache": gem.prefill(texts)}
    written, cache = gem.generate(**given, **OPEN, **options, return_cache=True)
    assert gem.generate(**given, **OPEN, **options) == written
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    num_new = []
    for text, new in zip(texts, written, strict=True):
        ids = torch.tensor([gem.tokenizer(text)["input_ids"]])
        allowed = 100 - ids.shape[1] if "max_length" in options else 20
        num_new.append(min(allowed, CONTEXT - ids.shape[1]))
        kwargs = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "max_new_tokens": num_new[-1]}
        output = base.generate(ids, **OPEN, **kwargs)
        assert new == gem.base.text.decode_continuation(output[0], ids.shape[1])
    assert cache.lengths.tolist() == [length + new for length, new in zip(lengths, num_new, strict=True)]


def test_a_full_row_has_no_place_to_write(gem):
    text, shorter = texts_of(gem, CONTEXT, CONTEXT - 1)
    cache = gem.extend(gem.prefill(shorter, max_length=CONTEXT), " a")
    assert cache.lengths.tolist() == [CONTEXT]
    message = f"{CONTEXT} tokens leave no place to write in the model's context of {CONTEXT}"
    for given in ({"cache": cache}, {"prompts": ["It rained", text]}):
        with pytest.raises(ValueError, match=message):
            gem.generate(**given, max_new_tokens=3)
    with pytest.raises(ValueError, match="exceed the model's context of 48"):
        gem.extend(cache, " more")
    assert len(gem.generate(cache=cache.crop(-3), **OPEN, max_new_tokens=9, return_cache=True).cache.input_ids[0]) == 48


def test_a_reconstruction_stops_at_the_context(gem):
    texts = texts_of(gem, 8, CONTEXT - 5, 20, CONTEXT - 20)
    memory = gem.compress(texts)
    written = gem.reconstruct(memory, **OPEN)
    assert written == [gem.reconstruct(row, **OPEN)[0] for row in memory.split()]
    assert written[2] == gem.reconstruct(memory[2:3], **OPEN, max_new_tokens=100)[0]


@pytest.mark.parametrize("freeze_base", [False, True])
def test_computed_positions_go_on_but_for_what_is_read_back(tmp_path, freeze_base):
    gem = load(tmp_path, lambda: ARCHITECTURES["llama"](**SHORT), freeze_base=freeze_base)
    texts = texts_of(gem, CONTEXT - 5, 8)
    short, long = (gem.generate(texts[0], **OPEN, max_new_tokens=number) for number in (5, 20))
    assert long.startswith(short)
    assert len(long) > len(short)
    written, cache = gem.generate(texts, **OPEN, max_new_tokens=20, return_cache=True)
    assert written[0] == short
    assert cache.lengths.tolist() == [CONTEXT, 28]
