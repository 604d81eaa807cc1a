"""One cache for embedding and generation: read once, embed, continue, extend, crop, keep, compress."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from gem_st import GemCache, GemLoss, GemMemory, GemTransformer
from gem_st.modeling import gem_cache, gem_embedder
from gem_st.modeling.gem_mask import Rows

from ..conftest import CORPUS, SIZES, build_tokenizer
from .test_frozen_base import take_steps

ARCHITECTURES = ["llama", "mistral", "gemma3", "gpt_neo"]  # all but the first have windows of 6 tokens
TEXTS = ["It rained all day.", "She bought bread, apples and a little cheese at the market.", "He"]
MORE = [" And then they went home, all of them.", "", " plays"]
GREEDY = {"max_new_tokens": 7, "do_sample": False}


@pytest.fixture(params=[True, False], ids=["frozen", "full"])
def make_gem(make_model, request):
    def make(architecture: str = "llama", num_gem_tokens: int = 2, **kwargs):
        model = make_model(architecture, num_gem_tokens=num_gem_tokens, freeze_base=request.param, **kwargs)
        return model, model[0]

    return make


def embed(model, texts) -> torch.Tensor:
    return model.encode(texts, convert_to_tensor=True)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-5)


def tensors(cache) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in cache.tensors().values()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_gem_tokens", [1, 3])
def test_summarize_equals_encode_and_leaves_the_cache(make_gem, architecture, num_gem_tokens):
    model, gem = make_gem(architecture, num_gem_tokens)
    cache = gem.prefill(TEXTS)
    before = tensors(cache)
    vectors = gem.summarize(cache)
    assert not vectors.requires_grad
    assert close(vectors, embed(model, TEXTS))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))
    assert torch.equal(gem.summarize(cache), vectors)
    gem.tokenizer.padding_side = "left"
    assert torch.equal(gem.summarize(gem.prefill(TEXTS)), vectors)
    for index, text in enumerate(TEXTS):
        assert close(gem.summarize(gem.prefill(text)), vectors[[index]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_from_a_cache_equals_generate_from_the_text(make_gem, architecture):
    _, gem = make_gem(architecture)
    cache = gem.prefill(TEXTS)
    before = tensors(cache)
    assert gem.generate(cache=cache, **GREEDY) == gem.generate(TEXTS, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))
    assert gem.generate(cache=cache[1], **GREEDY) == [gem.generate(TEXTS[1], **GREEDY)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extend_equals_prefill_of_the_whole(make_gem, architecture):
    _, gem = make_gem(architecture)
    cache = gem.prefill(TEXTS)
    read = []
    hook = gem.model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    longer = gem.extend(cache, MORE)
    hook.remove()
    assert read == [(3, max(len(gem.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in MORE))]
    whole = gem.prefill([text + more for text, more in zip(TEXTS, MORE, strict=True)])
    assert torch.equal(longer.input_ids, whole.input_ids)
    assert torch.equal(longer.attention_mask, whole.attention_mask)
    assert close(gem.summarize(longer), gem.summarize(whole))
    assert gem.generate(cache=longer, **GREEDY) == gem.generate(cache=whole, **GREEDY)
    assert close(gem.summarize(gem.extend(cache, " once")), gem.summarize(gem.prefill([f"{t} once" for t in TEXTS])))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_of_a_generation_holds_what_was_read_and_written(make_gem, architecture):
    _, gem = make_gem(architecture)
    out = gem.generate(TEXTS, return_cache=True, **GREEDY)
    assert out.text == gem.generate(TEXTS, **GREEDY)
    prompt = gem.pad([torch.tensor(row) for row in gem.base.text.encode(TEXTS)], padding_side="left")
    output = gem.model.generate(**prompt, **GREEDY, pad_token_id=1, suppress_tokens=gem.gem_token_ids)
    for row, ids in enumerate(output):
        real = ids[(~prompt["attention_mask"][row].bool()).sum() :]
        expected = real[: (real == 1).nonzero()[0, 0]] if (real == 1).any() else real
        assert out.cache.input_ids[row][out.cache.attention_mask[row]].tolist() == expected.tolist()
        assert close(gem.summarize(out.cache[row]), gem.summarize(gem.reader.append(None, [expected.tolist()])))
    again = gem.generate(cache=gem.prefill(TEXTS), return_cache=True, **GREEDY)
    assert torch.equal(again.cache.input_ids, out.cache.input_ids)
    assert close(gem.summarize(again.cache), gem.summarize(out.cache))
    single = gem.generate(TEXTS[0], return_cache=True, **GREEDY)
    assert single.text == out.text[0]
    assert len(single.cache) == 1


def test_rows_that_end_early_keep_no_end_token_and_no_padding(make_gem):
    _, gem = make_gem()
    start = len(gem.base.text.encode(TEXTS)[0])
    new = gem.generate(TEXTS[0], return_cache=True, eos_token_id=2, **GREEDY).cache.input_ids[0, start:].tolist()
    assert len(new) == 7
    stop = new[3]  # declared the end token
    out = gem.generate(TEXTS, return_cache=True, eos_token_id=stop, **GREEDY)
    assert out.cache.input_ids[0][out.cache.attention_mask[0]][start:].tolist() == new[: new.index(stop)]
    assert out.cache.lengths[1] > len(gem.base.text.encode(TEXTS)[1])


def test_the_end_and_padding_of_a_generation_may_be_set_in_any_way(make_gem):
    _, gem = make_gem()
    start = len(gem.base.text.encode(TEXTS)[0])
    new = gem.generate(TEXTS[0], return_cache=True, eos_token_id=2, **GREEDY).cache.input_ids[0, start:].tolist()
    config = GenerationConfig(eos_token_id=new[3], pad_token_id=7, **GREEDY)
    out = gem.generate(TEXTS, return_cache=True, generation_config=config)
    assert out.cache.input_ids[0][out.cache.attention_mask[0]][start:].tolist() == new[: new.index(new[3])]
    again = gem.generate(TEXTS, return_cache=True, eos_token_id=new[3], pad_token_id=7, **GREEDY)
    assert torch.equal(again.cache.attention_mask, out.cache.attention_mask)
    assert torch.equal(again.cache.input_ids[again.cache.attention_mask], out.cache.input_ids[out.cache.attention_mask])
    assert again.text == out.text


def test_generate_without_a_cache_leaves_it_to_transformers(make_gem):
    _, gem = make_gem()
    expected = gem.generate(TEXTS, **GREEDY)
    assert gem.generate(TEXTS, use_cache=False, **GREEDY) == expected
    assert gem.generate(TEXTS, cache_implementation="static", **GREEDY) == expected
    gem.model.generation_config.use_cache = False
    assert gem.generate(TEXTS, **GREEDY) == expected
    assert gem.generate(TEXTS, return_cache=True, **GREEDY).text == expected
    assert gem.generate(cache=gem.prefill(TEXTS), **GREEDY) == expected


def test_several_beams_and_sequences_start_from_one_row(make_gem):
    _, gem = make_gem()
    for options in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        options = {**GREEDY, **options}
        assert gem.generate(cache=gem.prefill(TEXTS), **options) == gem.generate(TEXTS, **options)


def test_a_cache_of_other_weights_is_refused(make_gem, tmp_path):
    model, gem = make_gem()
    cache, memory = gem.prefill(TEXTS), gem.compress(TEXTS)
    cache.save(tmp_path / "cache.safetensors")
    take_steps(model, GemLoss(model, alpha=1.0, plain_ratio=1.0), fused=True)
    if gem.freeze_base:
        gem.summarize(cache)  # the base is what it was
        gem.reconstruct(memory)
        with torch.no_grad():
            gem.model.model.layers[1].mlp.down_proj.weight[0] += 1
    for use in (
        lambda: gem.summarize(cache),
        lambda: gem.generate(cache=cache),
        lambda: gem.extend(cache, "a"),
        lambda: gem.summarize(GemCache.load(tmp_path / "cache.safetensors")),
        lambda: gem.reconstruct(memory),
    ):
        with pytest.raises(ValueError, match="made by other weights than the model's"):
            use()


def test_a_state_space_model_embeds_and_generates_but_has_no_such_cache(tmp_path, make_model):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=400, hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=0, eos_token_id=1
    )
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gem = GemTransformer(str(tmp_path)).eval()
    rows = [torch.tensor([0, *range(20, 34), *last, *gem.gem_token_ids]) for last in ([50], [60, 61])]
    with torch.no_grad():  # the shared prefix is not read apart
        together = gem(gem.pad(rows))["sentence_embedding"]
        assert close(together, torch.cat([gem(gem.pad([row]))["sentence_embedding"] for row in rows]))
    for use in (lambda: gem.prefill(TEXTS), lambda: gem.compress(TEXTS), lambda: gem.generate("a", return_cache=True)):
        with pytest.raises(ValueError, match="mamba does not continue from a cache of keys and values"):
            use()
    with pytest.raises(ValueError, match="mamba does not"):
        GemTransformer(str(tmp_path), freeze_base=True)


def test_longrope_is_not_mixed_over_its_original_length(tmp_path):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 2.0], "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0, **factors}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=400, rope_parameters=rope)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    gem = GemTransformer(str(tmp_path), freeze_base=True).eval()
    rows = [torch.arange(20, 20 + size) for size in (6, 12, 14, 20, 40)]
    rows = [torch.cat([row, torch.tensor(gem.gem_token_ids)]) for row in rows]
    with torch.no_grad():
        together = gem(gem.pad(rows, "right"))["sentence_embedding"]
        assert close(together, torch.cat([gem(gem.pad([row]))["sentence_embedding"] for row in rows]))
    with pytest.raises(ValueError, match=r"exceed the model's context of 16"):
        gem.prefill(["a b c d e f g h " * 4])


def test_several_sequences_of_a_prompt_are_rows(make_gem):
    _, gem = make_gem()
    torch.manual_seed(0)
    out = gem.generate(TEXTS, return_cache=True, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert len(out.text) == len(out.cache) == 6
    start = out.cache.crop([len(row) for row in gem.base.text.encode(TEXTS) for _ in range(2)])
    assert close(gem.summarize(start), gem.summarize(gem.prefill(TEXTS)).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_crop_goes_back_to_any_length(make_gem, architecture):
    _, gem = make_gem(architecture)
    cache = gem.prefill(TEXTS)
    longer = gem.extend(cache, MORE)
    lengths = cache.lengths.tolist()
    assert close(gem.summarize(longer.crop(lengths)), gem.summarize(cache))
    short = cache.crop(3)
    assert short.lengths.tolist() == [min(3, length) for length in lengths]
    ids = [row[:3] for row in gem.base.text.encode(TEXTS)]
    assert close(gem.summarize(short), gem.summarize(gem.reader.append(None, ids)))
    dropped = cache.crop(-1)
    assert dropped.lengths.tolist() == [length - 1 for length in lengths]
    assert close(gem.summarize(gem.extend(longer.crop(lengths), MORE)), gem.summarize(longer))
    assert torch.equal(cache.crop(1000).input_ids, cache.input_ids)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_rows_can_be_split_chosen_and_joined(make_gem, architecture):
    _, gem = make_gem(architecture)
    cache, other = gem.prefill(TEXTS), gem.prefill(["Once upon a time there was a small village."])
    vectors = gem.summarize(cache)
    parts = cache.split()
    assert [len(part) for part in parts] == [1, 1, 1]
    assert torch.equal(gem.summarize(cache[[2, 0]]), vectors[[2, 0]])
    assert torch.equal(cache[1:].input_ids, cache.input_ids[1:])
    joined = GemCache.join([parts[1], other, cache[[0, 2]]])
    expected = torch.cat([vectors[[1]], gem.summarize(other), vectors[[0, 2]]])
    assert close(gem.summarize(joined), expected)
    with pytest.raises(IndexError, match=r"Rows \[3\] were asked for, but there are 3"):
        cache[3]
    for index in (np.int64(1), torch.tensor(1), torch.tensor([False, True, False])):
        assert torch.equal(cache[index].input_ids, cache[1].input_ids)
    assert len(cache[[]]) == 0
    with pytest.raises(ValueError, match="one part or more, all made by the same model"):
        GemCache.join([])


def test_save_and_load_are_exact_and_know_what_they_hold(make_gem, tmp_path):
    _, gem = make_gem()
    cache, memory = gem.prefill(TEXTS), gem.compress(TEXTS)
    cache[1:].save(tmp_path / "cache.safetensors")
    memory.save(tmp_path / "memory.safetensors")
    again = GemCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(gem.summarize(again), gem.summarize(cache[1:]))
    assert again.attention_mask.dtype == torch.bool
    assert gem.reconstruct(GemMemory.load(tmp_path / "memory.safetensors")) == gem.reconstruct(memory)
    with pytest.raises(ValueError, match=r"cache.safetensors holds GemCache, not a GemMemory"):
        GemMemory.load(tmp_path / "cache.safetensors")


def test_a_cache_can_be_moved_and_cast(make_gem):
    _, gem = make_gem()
    cache = gem.prefill(TEXTS)
    half = cache.to("cpu", torch.bfloat16)
    assert half.layers[0][0].dtype == torch.bfloat16
    assert half.input_ids.dtype == torch.int64
    with pytest.raises(ValueError, match=r"2 layers of torch.bfloat16, the model 2 of torch.float32"):
        gem.summarize(half)
    meta = cache.to("meta")
    assert meta.attention_mask.device.type == "meta"
    with pytest.raises(ValueError, match=r"cache is on meta, the model on cpu. Use cache.to\(device\)"):
        gem.summarize(meta)


def test_chat_messages_can_be_read_and_embedded(make_gem):
    chat = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    _, gem = make_gem(chat_template=chat)
    messages = [{"role": "user", "content": "What is at the market?"}]
    ids = gem.tokenizer("user: What is at the market?\nassistant:", add_special_tokens=False)["input_ids"]
    cache = gem.prefill(messages)
    assert cache.input_ids.tolist() == [ids]
    assert gem.generate(cache=cache, **GREEDY) == [gem.generate(messages, **GREEDY)]


def test_empty_texts_and_empty_lists(make_gem):
    model, gem = make_gem()
    cache = gem.prefill(["", "a"])
    assert close(gem.summarize(cache), embed(model, ["", "a"]))
    assert gem.extend(cache, "").lengths.tolist() == cache.lengths.tolist()
    nothing = cache.crop(0)
    assert close(
        gem.summarize(gem.extend(nothing, "b c")),
        gem.summarize(gem.reader.append(None, [gem.tokenizer("b c", add_special_tokens=False)["input_ids"]] * 2)),
    )
    with pytest.raises(ValueError, match="A row of the cache is empty"):
        gem.generate(cache=nothing, **GREEDY)


def test_a_long_text_is_truncated_with_a_warning_as_encode_does(make_gem, warnings_of_transformers):
    model, gem = make_gem(max_seq_length=12)
    cache = gem.prefill(TEXTS)
    assert cache.lengths.max() == 10
    assert "truncated to 10 tokens" in warnings_of_transformers.text
    assert close(gem.summarize(cache), embed(model, TEXTS))
    assert close(
        gem.summarize(gem.prefill("It rained all day.", max_length=100)), embed(make_gem()[0], ["It rained all day."])
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gem: gem.summarize(DynamicCache()), "A GemCache is needed, got DynamicCache"),
        (lambda gem: gem.generate(), "generate needs either prompts or a cache"),
        (lambda gem: gem.generate("a", cache=gem.prefill("a")), "generate needs either prompts or a cache"),
        (lambda gem: gem.generate("a", return_cache=True, num_beams=2), "return_cache=True needs num_beams=1"),
        (lambda gem: gem.extend(gem.prefill(["a", "b"]), ["c"]), "one text for each of 2 rows, or one for all, got 1"),
        (lambda gem: gem.prefill(["a", "b"]).crop([1, 2, 3]), "one for each of 2 rows, got 3"),
        (lambda gem: gem.extend(gem.prefill("a"), "a b c " * 100), "exceed the model's context of 256"),
        (lambda gem: gem.prefill(["a", None]), "Input 1 of 2 is None"),
        (lambda gem: gem.prefill([]), "an empty list was given"),
        (lambda gem: gem.generate([], return_cache=True), "an empty list was given"),
        (lambda gem: gem.generate("a", return_cache=True, use_cache=False), "use_cache=False was given, but a cache"),
        (lambda gem: gem.generate(cache=gem.prefill("a"), prompt_lookup_num_tokens=2), "cannot start from a cache"),
        (
            lambda gem: gem.generate("a", return_cache=True, generation_config=GenerationConfig(num_beams=2)),
            "return_cache=True needs num_beams=1",
        ),
        (lambda gem: gem.reconstruct(gem.prefill("a")), "A GemMemory is needed, got GemCache"),
    ],
)
def test_what_cannot_be_done_is_said(make_gem, call, message):
    _, gem = make_gem()
    with pytest.raises(ValueError, match=message):
        call(gem)


def test_training_mode_is_restored_and_dropout_does_not_act(make_model):
    model = make_model(freeze_base=True, lora_kwargs={"lora_dropout": 0.5})
    gem = model[0]
    expected = gem.summarize(gem.prefill(TEXTS))
    model.train()
    assert torch.equal(gem.summarize(gem.prefill(TEXTS)), expected)
    assert gem.training
    assert gem.adapter_model.training


# ---- memory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_gem_tokens", [1, 3])
def test_a_memory_is_the_gem_tokens_keys_and_values(make_gem, architecture, num_gem_tokens):
    _, gem = make_gem(architecture, num_gem_tokens)
    memory = gem.compress(TEXTS)
    assert len(memory) == 3
    assert all(tensor.shape[2] == num_gem_tokens for layer in memory.layers for tensor in layer)
    assert memory.lengths.tolist() == [len(row) for row in gem.base.text.encode(TEXTS)]
    joined = GemMemory.join(memory.split())
    assert gem.reconstruct(joined) == gem.reconstruct(memory) == gem.reconstruct(gem.compress(gem.prefill(TEXTS)))


@pytest.mark.parametrize("num_gem_tokens", [1, 2])
def test_reconstruct_decodes_greedily_behind_the_mask(make_gem, num_gem_tokens):
    """Token by token, with whole rows through the masked model that training uses."""
    _, gem = make_gem(num_gem_tokens=num_gem_tokens)
    for text in TEXTS:
        prefix = gem.base.text.encode([text])[0]
        row = [*prefix, *gem.gem_token_ids]
        head = gem.model.get_output_embeddings()
        with torch.no_grad():
            for _ in range(len(prefix) - 1):  # as many as the text has without BOS
                states = gem.eval()(gem.pad([torch.tensor(row)]))["token_embeddings"]
                logits = head(states[0, -1])
                if not gem.freeze_base:
                    logits[gem.gem_token_ids] = -torch.inf
                row.append(int(logits.argmax()))
                if row[-1] == 1:
                    break
        written = row[len(prefix) + num_gem_tokens :]
        assert gem.reconstruct(gem.compress([text])) == [gem.tokenizer.decode(written, skip_special_tokens=True)]


# ---- a prefix that all rows share


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_gem_tokens", [1, 2])
def test_a_shared_instruction_is_read_once_and_vectors_stay(make_gem, architecture, num_gem_tokens, monkeypatch):
    model, gem = make_gem(architecture, num_gem_tokens)
    prompt = "Once upon a time there was a small village by the sea. Embed this text: "
    texts = [*TEXTS, ""]
    read = []
    hook = gem.model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    reused = model.encode(texts, prompt=prompt, convert_to_tensor=True)
    hook.remove()
    num_prompt = len(gem.base.text.encode([prompt.rstrip()])[0])
    num_all = sum(len(row) for row in gem.base.text.encode(texts, prompt))
    assert min(read) < num_all / len(texts)
    assert any(abs(size - num_prompt) <= 2 for size in read)
    monkeypatch.setattr(gem_embedder, "SHARED_PREFIX_LENGTH", 10**9)
    assert close(reused, model.encode(texts, prompt=prompt, convert_to_tensor=True))
    alone = torch.cat([model.encode([text], prompt=prompt, convert_to_tensor=True) for text in texts])
    assert close(reused, alone)


def test_the_same_text_many_times_and_a_text_that_is_the_prefix_of_another(make_gem):
    model, _ = make_gem()
    text = "Once upon a time there was a small village by the sea."
    texts = [text, f"{text} It rained.", text]
    alone = torch.cat([embed(model, [text]) for text in texts])
    assert close(embed(model, texts), alone)
    assert close(embed(model, [text] * 3), alone[[0, 0, 0]])


def test_nothing_is_shared_while_gradients_are_needed(make_gem):
    _, gem = make_gem()
    features = gem.preprocess(CORPUS[:2], prompt="Once upon a time there was a small village: ")
    rows, read = Rows.of(*features.values(), gem.gem_token_ids), gem.embedder.read_shared_prefix
    gem.eval()
    assert read(rows) is None
    with torch.no_grad():
        assert read(rows) is not None
        assert read(rows.take(torch.tensor([0]), 99)) is None
        gem.train()
        assert read(rows) is None


def test_a_cache_of_the_installed_package_serves_a_checkpoints_own_class(make_gem, tmp_path):
    from sentence_transformers import SentenceTransformer

    model, gem = make_gem()
    model.save_pretrained(str(tmp_path / "model"))
    remote = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")[0]
    cache, memory = remote.prefill(TEXTS), remote.compress(TEXTS)
    assert repr(cache).startswith("GemCache(3 rows, ")
    cache.save(tmp_path / "cache.safetensors")
    assert torch.equal(remote.summarize(GemCache.load(tmp_path / "cache.safetensors")), gem.summarize(cache))
    assert gem.reconstruct(memory) == remote.reconstruct(gem.compress(cache))


def test_the_cache_goes_by_the_name_that_a_model_has_for_it():
    def new(input_ids: torch.Tensor, cache: object = None) -> None: ...
    def old(input_ids: torch.Tensor, past_key_values: object = None) -> None: ...

    assert (gem_cache.cache_name(new), gem_cache.cache_name(old)) == ("cache", "past_key_values")
