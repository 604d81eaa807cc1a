"""Segments, positions, the GEM mask, and what the backbone does with it."""

from __future__ import annotations

import shutil

import pytest
import torch

from gem_st import GemLoss, gem_attention_mask
from gem_st.losses.objective import RowObjective
from gem_st.losses.rows import split_rows
from gem_st.modeling import gem_groups, gem_mask, gem_passes
from gem_st.modeling.gem_groups import length_buckets, pack_texts
from gem_st.modeling.gem_mask import GEM, PREFIX, SUFFIX, gem_position_ids, gem_segments
from gem_st.modeling.gem_passes import PackedPass
from gem_st.modeling.gem_tokens import pool_gem_tokens

from ..conftest import CORPUS

P, G, S = PREFIX, GEM, SUFFIX
GEM_IDS = [90, 91]

# The matrix of `gem_attention_mask`'s docstring: a b | G H | c d.
MIDDLE_ROW = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 0, 1, 0, 0],
    [0, 0, 1, 1, 1, 0],
    [0, 0, 1, 1, 1, 1],
]


def build_mask(model, segments, attention_mask):
    return gem_attention_mask(model[0].model.config, segments, attention_mask, torch.float32)


def test_segments_of_plain_end_and_middle_rows():
    ids = torch.tensor([[5, 6, 90, 91, 7, 8], [0, 0, 5, 6, 90, 91], [5, 6, 7, 8, 9, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert gem_segments(ids, real, GEM_IDS).tolist() == [[P, P, G, G, S, S], [P, P, P, P, G, G], [P, P, P, P, P, P]]


def test_a_gem_id_in_padding_is_padding():
    ids, real = torch.tensor([[5, 90, 91, 90]]), torch.tensor([[1, 1, 1, 0]])
    assert gem_segments(ids, real, GEM_IDS).tolist() == [[P, G, G, P]]


def test_gem_tokens_share_one_position_and_the_suffix_follows():
    segments = torch.tensor([[P, P, G, G, S, S], [P, P, P, P, G, G], [P, G, G, S, P, P]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert gem_position_ids(segments, real).tolist() == [[0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 2, 2], [0, 1, 1, 2, 2, 2]]


def test_mask_is_the_matrix_in_the_docstring(make_model):
    segments = torch.tensor([[P, P, G, G, S, S]])
    mask = build_mask(make_model(num_gem_tokens=2), segments, torch.ones_like(segments))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == MIDDLE_ROW


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_mask_of_a_mixed_batch_with_padding_on_either_side(make_model, attention):
    model = make_model(num_gem_tokens=2, model_kwargs={"attn_implementation": attention})
    segments = torch.tensor([[P, P, P, G, G, S], [P, P, P, P, G, G], [P, P, P, P, P, P]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    mask = build_mask(model, segments, real)[:, 0]
    allowed = (mask == 0) if attention == "eager" else mask
    left_padded_middle = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    end = torch.ones(6, 6).tril().int()
    end[5, 4] = 0
    assert allowed[0, 1:, 1:].int().tolist() == left_padded_middle
    assert not allowed[0, 1:, 0].any()
    assert allowed[1].int().tolist() == end.tolist()
    assert allowed[2, :4, :4].int().tolist() == torch.ones(4, 4).tril().int().tolist()
    assert not allowed[2, :4, 4:].any()


def test_layers_of_two_kinds_get_a_mask_each(make_model):
    segments = torch.tensor([[P, P, P, P, P, P, P, G, G, S]])
    masks = build_mask(make_model("gemma3", num_gem_tokens=2), segments, torch.ones_like(segments))
    assert set(masks) == {"full_attention", "sliding_attention"}
    # Window of 6: the first GEM token, at place 7, reaches back to place 2.
    assert masks["full_attention"][0, 0, 7].int().tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert masks["sliding_attention"][0, 0, 7].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "gpt_neo"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_forbidden_token_moves_nothing_and_an_allowed_one_does(make_model, architecture, attention):
    if architecture == "gpt_neo" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for GPT-Neo")
    gem = make_model(architecture, num_gem_tokens=2, model_kwargs={"attn_implementation": attention})[0].eval()
    segments = torch.tensor([[P, P, G, G, S, S]])
    ids = torch.tensor([[10, 11, *gem.gem_token_ids, 12, 13]])
    real = torch.ones_like(ids)
    before = gem.base.states(ids, segments, real)
    for key, row in enumerate(torch.tensor(MIDDLE_ROW).T):
        changed = ids.clone()
        changed[0, key] = 20
        moved = (gem.base.states(changed, segments, real) - before).abs().amax(-1)[0] > 1e-7
        # A suffix token is moved by a prefix token through the GEM tokens, although it cannot attend to it.
        through_gem = torch.tensor([False] * 4 + [key < 2] * 2)
        assert moved.tolist() == (row.bool() | through_gem).tolist()


def test_the_suffix_sees_the_prefix_only_through_the_gem_tokens(make_model):
    """With the hidden states of the GEM tokens held fixed, no gradient reaches the prefix."""
    gem = make_model(num_gem_tokens=1)[0].eval()
    embedding = gem.model.get_input_embeddings()
    ids = torch.tensor([[10, 11, 12, *gem.gem_token_ids, 13, 14]])
    segments, real = torch.tensor([[P, P, P, G, S, S]]), torch.ones_like(ids)
    inputs = embedding(ids).detach().requires_grad_()
    mask = gem_attention_mask(gem.model.config, segments, real, torch.float32)
    handle = gem.model.base_model.layers[0].register_forward_hook(
        lambda module, args, output: torch.where((segments == G)[..., None], output.detach(), output)
    )
    states = gem.model.base_model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
    handle.remove()
    states[0, 4:].sum().backward()
    assert inputs.grad[0, 4:].abs().max() > 0
    # Layer 1's GEM states, the only road from the prefix to the suffix's last layer, were cut off.
    assert inputs.grad[0, :3].abs().max() == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles flex_attention with g++, which is not installed")
def test_flex_attention_agrees_with_eager(make_model):
    texts = ["Once upon a time there was a village.", "It rained.", ""]
    vectors = {}
    for attention in ("eager", "flex_attention"):
        model = make_model(
            num_gem_tokens=3, hidden_size=64, head_dim=16, model_kwargs={"attn_implementation": attention}
        )
        vectors[attention] = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(vectors["eager"], vectors["flex_attention"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neo"])
def test_one_gem_token_is_the_bare_backbone_at_the_last_token(make_model, architecture):
    model = make_model(architecture)
    gem = model[0]
    text = "The fisherman took his boat out."
    ids = torch.tensor([[*gem.tokenizer(text)["input_ids"], *gem.gem_token_ids]])
    expected = gem.model.eval().base_model(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(model.encode(text, convert_to_tensor=True), expected, atol=1e-6, rtol=1e-5)


def test_no_mask_is_built_for_one_gem_token_without_suffix(make_model, monkeypatch):
    model = make_model()
    seen = {}
    backbone = type(model[0].model.base_model)
    original = backbone.forward

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(backbone, "forward", spy)
    model.encode(["short", "a somewhat longer text"])
    assert "input_ids" in seen
    assert seen.get("attention_mask") is None
    assert seen.get("position_ids") is None


@pytest.mark.parametrize(("architecture", "config"), [("llama", {}), ("qwen3", {}), ("gpt_neo", {"window_size": 256})])
def test_k_tokens_in_one_row_equal_k_rows_of_one_token(make_model, architecture, config):
    model = make_model(architecture, num_gem_tokens=4, pooling="concat", **config)
    gem = model[0]
    text = "They walked along the river."
    prefix = gem.tokenizer(text)["input_ids"]
    rows = torch.tensor([[*prefix, token_id] for token_id in gem.gem_token_ids])
    single = gem.model.eval().base_model(rows).last_hidden_state[:, -1]
    torch.testing.assert_close(model.encode(text, convert_to_tensor=True).view(4, -1), single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "gpt_neo"])
@pytest.mark.parametrize("num_gem_tokens", [1, 3])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_and_padding_do_not_change_a_vector(make_model, architecture, num_gem_tokens, padding_side):
    model = make_model(architecture, num_gem_tokens=num_gem_tokens, processor_kwargs={"padding_side": padding_side})
    texts = [
        "It rained.",
        "",
        "She bought bread, apples and a little cheese at the market. " * 3,
        "\U0001f642\U0001f642",
    ]
    together = model.encode(texts, convert_to_tensor=True)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_rows_padded_on_both_sides_as_merged_columns_are(make_model):
    model = make_model(num_gem_tokens=2, processor_kwargs={"padding_side": "left"})
    features = model.preprocess(["It rained.", "She bought bread at the market."])
    merged = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in features.items()}
    expected = model(dict(features))
    result = model(merged)
    torch.testing.assert_close(result["sentence_embedding"], expected["sentence_embedding"], atol=1e-6, rtol=1e-5)
    real = features["attention_mask"].bool()
    torch.testing.assert_close(
        result["token_embeddings"][:, :-3][real], expected["token_embeddings"][real], atol=1e-6, rtol=1e-5
    )


def test_token_embeddings_are_those_of_the_row(make_model):
    model = make_model()
    text = "It rained all day."
    tokens = model.encode(text, output_value="token_embeddings")
    assert len(tokens) == len(model[0].tokenizer(text)["input_ids"]) + 1
    torch.testing.assert_close(tokens[-1], model.encode(text, convert_to_tensor=True))


def test_length_buckets_split_where_padding_costs_more_than_a_pass():
    lengths = torch.tensor([10, 50, 9, 48, 50, 10])
    buckets = length_buckets(lengths, cost=20)
    assert [bucket.tolist() for bucket in buckets] == [[1, 4, 3], [0, 5, 2]]
    assert [bucket.tolist() for bucket in length_buckets(lengths, cost=1000)] == [[1, 4, 3, 0, 5, 2]]


def test_groups_of_like_length_give_the_states_of_one_batch(make_model, monkeypatch):
    model = make_model(num_gem_tokens=2).eval()
    features = model.preprocess(["It rained.", "She bought bread. " * 8, "A letter came.", "They walked along. " * 8])
    states, passes = [], []
    model[0].model.model.register_forward_hook(lambda *_: passes.append(1))
    for cost, num_passes in ((10**6, 1), (0, 3)):
        monkeypatch.setitem(gem_groups.GROUP_COST, "cpu", cost)
        with torch.no_grad():
            states.append(model(dict(features))["token_embeddings"])
        assert len(passes) == num_passes
        passes.clear()
    one_batch, grouped = states
    real = features["attention_mask"].bool()
    torch.testing.assert_close(grouped[real], one_batch[real], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gem_tokens_are_put_behind_groups_of_all_lengths_at_once(make_model, monkeypatch, architecture):
    model = make_model(architecture, num_gem_tokens=2, freeze_base=True).eval()
    gem = model[0]
    texts = ["", "It rained.", "She bought bread. " * 8, "A letter came.", "They walked along. " * 8]
    rows = [model.preprocess([text])["input_ids"][0] for text in texts]
    rows[1], rows[2] = torch.cat([rows[1], rows[3][:4]]), torch.cat([rows[2], rows[4][:9]])  # with a suffix
    features = gem.pad(rows, padding_side="right")
    reads, stages, states = [], [], []
    gem.model.model.register_forward_hook(lambda *_: reads.append(1))
    gem.adapter_model.model.register_forward_hook(lambda *_: stages.append(1))
    for cost, places, num_reads, num_stages in ((10**6, 10**6, 2, 1), (0, 10**6, 5, 1), (0, 60, 6, 3)):
        monkeypatch.setitem(gem_groups.GROUP_COST, "cpu", cost)
        monkeypatch.setattr(gem_groups, "STAGE_TOKENS", places)
        with torch.no_grad():
            states.append(model(dict(features))["token_embeddings"])
        assert (len(reads), len(stages)) == (num_reads, num_stages)
        reads.clear()
        stages.clear()
    real = features["attention_mask"].bool()
    for grouped in states[1:]:
        torch.testing.assert_close(grouped[real], states[0][real], atol=1e-5, rtol=1e-4)


def test_rows_are_staged_together_while_there_are_places(monkeypatch):
    monkeypatch.setattr(gem_groups, "STAGE_TOKENS", 20)
    groups = gem_groups.stage_groups(torch.tensor([3, 10, 2, 9, 30]))
    assert [group.tolist() for group in groups] == [[4], [1, 3], [0, 2]]


def test_pooling_means_or_concatenates_the_gem_states():
    states = torch.arange(12.0).view(1, 6, 2)
    segments = torch.tensor([[P, P, G, G, S, S]])
    assert pool_gem_tokens(states, segments, 2, "mean").tolist() == [[5.0, 6.0]]
    assert pool_gem_tokens(states, segments, 2, "concat").tolist() == [[4.0, 5.0, 6.0, 7.0]]


@pytest.mark.parametrize("freeze_base", [False, True])
def test_rows_without_their_gem_tokens_are_refused(make_model, freeze_base):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base).eval()
    features = model.preprocess(["It rained.", "They walked along the river."])
    cut = {key: value[:, :-1] for key, value in features.items()}
    with torch.no_grad(), pytest.raises(ValueError, match=r"exactly 2 GEM token\(s\).*hold \[2, 1\]"):
        model(cut)


def test_bfloat16_vectors_stay_close_to_float32(make_model):
    texts = ["It rained.", "She bought bread, apples and a little cheese at the market."]
    full = make_model(num_gem_tokens=3).encode(texts, convert_to_tensor=True)
    half = make_model(num_gem_tokens=3, model_kwargs={"dtype": torch.bfloat16}).encode(texts, convert_to_tensor=True)
    assert half.dtype == torch.float32  # as what is trained, and as modules behind it expect
    assert torch.cosine_similarity(full, half.float()).min() > 0.999


# ---- packing


def test_short_texts_share_a_row():
    places = pack_texts(torch.tensor([2, 5, 3, 1]), 6)
    assert places.tolist() == [[6, 7, 8, 9, 10], [12, 13, 14, 0, 1], [18, -1, -1, -1, -1]]
    assert pack_texts(torch.tensor([3, 3]), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "gpt_neo"])
def test_packed_texts_have_the_states_and_gradients_they_have_alone(make_model, monkeypatch, architecture, attention):
    if architecture == "gpt_neo" and attention == "sdpa":
        attention = "eager"
    kwargs = {"model_kwargs": {"attn_implementation": attention}}
    model = make_model(architecture, num_gem_tokens=2, **kwargs).train()
    gem = model[0]
    loss = GemLoss(model, plain_ratio=0.5, alpha=0.5)
    torch.manual_seed(0)
    rows, _ = loss.build_rows(split_rows(*model.preprocess(CORPUS).values(), gem.gem_token_ids))
    results, calls = [], []
    run = PackedPass.__call__
    monkeypatch.setattr(PackedPass, "__call__", lambda *args: calls.append(1) or run(*args))
    for padding in (10**9, 0):
        monkeypatch.setattr(gem_passes, "PACKED_PADDING", padding)
        monkeypatch.setitem(gem_groups.GROUP_COST, "cpu", padding)
        model.zero_grad()
        features = loss.collate(rows)
        output = model({**features, "objective": RowObjective(features.pop("labels"))})
        (output["ntp_loss"] + output["sentence_embedding"].square().sum()).backward()
        gradient = gem.model.get_input_embeddings().weight.grad.clone()
        results.append((output["sentence_embedding"], output["ntp_loss"], gradient))
    assert len(calls) == 1
    for single, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, single, atol=2e-5, rtol=1e-4)


def test_models_that_cannot_be_masked_are_not_packed(make_model, monkeypatch):
    assert make_model()[0].embedder.packed.works
    assert make_model(freeze_base=True)[0].embedder.packed is None
    monkeypatch.setattr(gem_mask, "combine_masks", lambda mask, rule, is_causal: is_causal.expand_as(rule))
    assert not make_model()[0].embedder.packed.works
