"""Rows, views, the parts of the loss, and their gradients, computed by hand where that can be done."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from torch.nn import functional as F

from gem_st import AlphaSchedule, GemLoss, GemTransformer, TwoPhaseLearningRate
from gem_st.losses import find_same_texts, info_nce, next_token, text_keys
from gem_st.losses.gem_loss import MAX_LOGIT_SCALE
from gem_st.losses.objective import RowObjective
from gem_st.losses.rows import (
    cut_continuation,
    draw_crops,
    drop_tokens,
    fit_pair,
    join_row,
    repeat_for_reconstruction,
    split_messages,
    split_rows,
)

from ..conftest import CORPUS, quiet_arguments


@pytest.fixture
def model(make_model):
    return make_model(num_gem_tokens=2)


# ---- views


def test_split_rows_takes_padding_and_gem_tokens_out():
    ids = torch.tensor([[5, 6, 90, 91, 0], [0, 0, 7, 90, 91]])
    real = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    assert [row.tolist() for row in split_rows(ids, real, [90, 91])] == [[5, 6], [7]]


def test_join_row_makes_every_token_but_the_gem_tokens_a_target():
    row, labels = join_row(torch.tensor([5, 6]), [90, 91], torch.tensor([7, 8]))
    assert row.tolist() == [5, 6, 90, 91, 7, 8]
    assert labels.tolist() == [5, 6, -100, -100, 7, 8]
    assert join_row(torch.tensor([5, 6]), [90])[0].tolist() == [5, 6, 90]


def test_continuation_cuts_anywhere_after_bos_and_before_the_end():
    row = torch.tensor([0, 5, 6, 7])
    cuts = set()
    for _ in range(50):
        prefix, suffix = cut_continuation(row, 100, num_special=1)
        assert prefix.tolist() + suffix.tolist() == [0, 5, 6, 7]
        cuts.add(len(prefix))
    assert cuts == {2, 3}
    assert [part.tolist() for part in cut_continuation(torch.tensor([0, 5]), 100, num_special=1)] == [[0, 5], []]


def test_reconstruction_repeats_the_text_without_bos_as_far_as_it_fits():
    row = torch.tensor([0, 5, 6, 7])
    assert [part.tolist() for part in repeat_for_reconstruction(row, 100, 1)] == [[0, 5, 6, 7], [5, 6, 7]]
    assert [part.tolist() for part in repeat_for_reconstruction(row, 5, 1)] == [[0, 5, 6], [5, 6]]


def test_drop_tokens_keeps_bos_order_and_at_least_one_token():
    torch.manual_seed(0)
    row = torch.arange(1000)
    kept = drop_tokens(row, 0.3, num_special=1)
    assert kept[0] == 0
    assert (kept.diff() > 0).all()
    assert 0.65 < len(kept) / 1000 < 0.75
    assert drop_tokens(row, 0.0).tolist() == row.tolist()
    for _ in range(20):
        assert len(drop_tokens(torch.tensor([0, 5, 6]), 0.99, num_special=1)) >= 2
    assert drop_tokens(torch.tensor([0]), 0.99, num_special=1).tolist() == [0]


# ---- pure functions


def test_info_nce_by_hand():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidates = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # Cosines are [1, 0, 1/sqrt 2] and [0, 1, 1/sqrt 2].
    expected = -2.0 + math.log(math.exp(2.0) + 1.0 + math.exp(2.0 / math.sqrt(2.0)))
    assert info_nce(anchors, candidates, 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_a_candidate_with_the_text_of_the_positive_is_no_negative():
    texts = [torch.tensor(text) for text in ([1, 2], [3], [1, 2], [3], [4])]
    same = find_same_texts(text_keys(texts), 3)
    assert same.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    torch.manual_seed(0)
    anchors, candidates = torch.randn(3, 4), torch.randn(5, 4)
    kept = info_nce(anchors[:1], candidates[[0, 1, 3, 4]], 5.0)
    torch.testing.assert_close(info_nce(anchors[:1], candidates, 5.0, same[:1]), kept)


def test_repeated_and_empty_texts_are_not_told_apart(model):
    model.train()
    loss = GemLoss(model, alpha=1.0, plain_ratio=1.0)
    assert loss([model.preprocess([""] * 4)]).item() == pytest.approx(0.0, abs=1e-6)


def full_logits_loss(states, labels, head):
    logits = head(states)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("road", ["all at once", "linear_cross_entropy", "chunked", "softcapped, chunked"])
def test_next_token_loss_is_the_cross_entropy_of_full_logits(monkeypatch, road):
    torch.manual_seed(0)
    states = torch.randn(3, 9, 16, requires_grad=True)
    head = torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(50, (3, 9))
    labels[0, 4:6] = -100
    config = None
    if road != "all at once":
        monkeypatch.setattr(next_token, "LOGITS_BUDGET", 100)
    if "chunked" in road:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    expected = full_logits_loss(states, labels, head)
    if "softcapped" in road:
        config = type("Config", (), {"final_logit_softcapping": 0.5})
        expected = full_logits_loss(states, labels, lambda x: torch.tanh(head(x) / 0.5) * 0.5)
    if road == "linear_cross_entropy":
        if not hasattr(F, road):
            pytest.skip("torch has no linear_cross_entropy yet")
        calls, function = [], F.linear_cross_entropy
        monkeypatch.setattr(F, road, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    result = next_token.next_token_loss(states, labels, head, config)
    assert road != "linear_cross_entropy" or calls == [1]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected, [states, head.weight])
    for gradient, other in zip(torch.autograd.grad(result, [states, head.weight]), wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_low_precision_does_not_blur_the_loss(monkeypatch):
    torch.manual_seed(0)
    states, labels = torch.randn(4, 100, 32), torch.randint(4000, (4, 100))
    head = torch.nn.Linear(32, 4000, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = next_token.next_token_loss(states, labels, head)
        monkeypatch.setattr(next_token, "LOGITS_BUDGET", 10_000)
        torch.testing.assert_close(next_token.next_token_loss(states, labels, head), expected, atol=1e-5, rtol=1e-5)


def test_large_logits_are_never_built_at_once(monkeypatch):
    sizes = []
    original = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, *args, **kw: sizes.append(logits.numel()) or original(logits, *args, **kw)
    )
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(next_token, "LOGITS_BUDGET", 400)
    next_token.next_token_loss(torch.randn(2, 40, 8), torch.randint(50, (2, 40)), torch.nn.Linear(8, 50))
    assert max(sizes) <= 400
    assert sum(sizes) == 2 * 39 * 50


def test_a_batch_without_targets_has_a_loss_of_zero():
    states = torch.randn(2, 4, 8, requires_grad=True)
    loss = next_token.next_token_loss(states, torch.full((2, 4), -100), torch.nn.Linear(8, 5))
    loss.backward()
    assert loss.item() == 0.0
    assert states.grad.abs().max() == 0


def with_objective(model, features: dict) -> dict:
    return model({**features, "objective": RowObjective(features.pop("labels"))})


def test_the_ntp_loss_of_plain_rows_is_the_base_models(model):
    """GEM tokens at the end change nothing to their left (paper, section 3)."""
    gem = model[0].eval()
    loss = GemLoss(model, plain_ratio=1.0)
    texts = split_rows(*model.preprocess(CORPUS).values(), gem.gem_token_ids)
    rows, _ = loss.build_rows(texts)
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    expected = gem.model(input_ids=ids.clamp(min=0), labels=ids).loss
    torch.testing.assert_close(with_objective(model, loss.collate(rows))["ntp_loss"], expected, atol=1e-5, rtol=1e-5)


def test_the_first_suffix_token_is_predicted_from_the_last_gem_token(model):
    gem = model[0].eval()
    row, labels = join_row(torch.tensor([0, 10, 11]), gem.gem_token_ids, torch.tensor([12, 13]))
    features = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], "labels": labels[None]}
    loss = with_objective(model, dict(features))["ntp_loss"]
    log_probs = gem.model.get_output_embeddings()(model(features)["token_embeddings"][0]).log_softmax(-1)
    # place 3 and 4 hold the GEM tokens; 2 would predict a GEM token and 3 the other one
    expected = -(log_probs[0, 10] + log_probs[1, 11] + log_probs[4, 12] + log_probs[5, 13]) / 4
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# ---- GemLoss


def test_rows_follow_plain_ratio_and_tasks(model):
    torch.manual_seed(0)
    texts = [torch.tensor([0, *range(10, 20)])] * 400
    rows, prefixes = GemLoss(model, plain_ratio=0.75, tasks=["reconstruction"]).build_rows(texts)
    lengths = torch.tensor([len(row) for row, _ in rows])
    assert set(lengths.tolist()) == {13, 23}
    assert 0.70 < (lengths == 13).float().mean() < 0.80
    assert all(len(prefix) == 11 for prefix in prefixes)
    rows, prefixes = GemLoss(model, plain_ratio=0.0, tasks=["continuation"]).build_rows(texts)
    assert {len(row) for row, _ in rows} == {13}
    assert {len(prefix) for prefix in prefixes} == set(range(2, 11))


def test_no_row_is_longer_than_the_model_allows(make_model):
    model = make_model("gpt_neo", num_gem_tokens=2, max_seq_length=16)
    loss = GemLoss(model, plain_ratio=0.0)
    features = model.preprocess(["word " * 100] * 8)
    rows, _ = loss.build_rows(split_rows(*features.values(), model[0].gem_token_ids))
    assert max(len(row) for row, _ in rows) == 16
    loss.model.train()
    # weights near zero say nothing of the next token
    value = GemLoss(model, plain_ratio=0.0, alpha=0.0)([features]).item()
    assert value == pytest.approx(math.log(model[0].model.config.vocab_size), abs=0.2)


def test_the_loss_is_the_weighted_sum_of_its_parts(model):
    model.eval()
    features = [model.preprocess(CORPUS)]
    parts = {alpha: GemLoss(model, alpha=alpha)(features).item() for alpha in (0.0, 0.25, 1.0)}
    assert parts[0.25] == pytest.approx(0.75 * parts[0.0] + 0.25 * parts[1.0], rel=1e-5)
    assert abs(parts[0.0] - parts[1.0]) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradients_reach_what_each_part_trains(model, alpha):
    loss = GemLoss(model, alpha=alpha)
    model.train()
    torch.manual_seed(0)
    loss([model.preprocess(CORPUS)]).backward()
    gem = model[0]
    rows = gem.model.get_input_embeddings().weight.grad[gem.gem_token_ids]
    assert rows.abs().max() > 0
    scale_gradient = gem.logit_scale.grad
    assert (scale_gradient is None or scale_gradient.item() == 0) if alpha == 0 else scale_gradient.item() != 0
    assert gem.model.base_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_pairs_and_hard_negatives_are_supervised(model):
    model.eval()
    columns = [CORPUS[:3], CORPUS[3:6], ["no", "not this", "never"]]
    loss = GemLoss(model, alpha=1.0, plain_ratio=1.0, scale=10.0)
    embeddings = [model.encode(column, convert_to_tensor=True) for column in columns]
    result = loss([model.preprocess(column) for column in columns])
    torch.testing.assert_close(result, info_nce(embeddings[0], torch.cat(embeddings[1:]), 10.0), atol=1e-5, rtol=1e-5)
    pairs = loss([model.preprocess(column) for column in columns[:2]])
    torch.testing.assert_close(pairs, info_nce(embeddings[0], embeddings[1], 10.0), atol=1e-5, rtol=1e-5)


def test_draws_follow_the_global_seed_and_differ_between_calls(model):
    model.train()
    loss = GemLoss(model, alpha=0.5)
    features = [model.preprocess(CORPUS)]
    torch.manual_seed(3)
    first = [loss(features).item() for _ in range(3)]
    torch.manual_seed(3)
    assert [loss(features).item() for _ in range(3)] == first
    assert len(set(first)) == 3


def test_evaluation_is_deterministic_and_leaves_the_global_generator_alone(model):
    model.eval()
    loss = GemLoss(model, alpha=0.5)
    features = [model.preprocess(CORPUS)]
    state = torch.get_rng_state()
    assert loss(features).item() == loss(features).item()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_scale_starts_at_20_and_is_clamped(model):
    loss = GemLoss(model, alpha=0.5)
    gem = model[0]
    assert gem.logit_scale.exp().item() == pytest.approx(20.0, rel=1e-6)
    GemLoss(model, alpha=0.5, scale=30.0)
    GemLoss(model, alpha=0.5)  # keeps what the model has learned
    assert gem.logit_scale.exp().item() == pytest.approx(30.0, rel=1e-6)
    features = [model.preprocess(CORPUS)]
    for outside, inside in ((9.0, MAX_LOGIT_SCALE), (-1.0, 0.0)):
        with torch.no_grad():
            gem.logit_scale.fill_(outside)
        loss(features)
        assert gem.logit_scale.item() == pytest.approx(inside)
    assert dict(loss.named_parameters())["model.0.logit_scale"].requires_grad


def test_left_padded_columns_give_the_same_loss(make_model):
    losses = []
    for side in ("left", "right"):
        model = make_model(num_gem_tokens=2, processor_kwargs={"padding_side": side}).eval()
        losses.append(GemLoss(model, alpha=0.5)([model.preprocess(CORPUS)]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- schedules


def test_alpha_schedule():
    alpha = AlphaSchedule(num_ntp_steps=100, final=0.9)
    assert [alpha(step, 1000) for step in (0, 99, 100, 550, 1000)] == pytest.approx([0, 0, 0, 0.45, 0.9])
    assert [AlphaSchedule(100, 1.0, 0)(step, 1000) for step in (99, 100, 101)] == [0, 1, 1]
    assert [AlphaSchedule(10, 1.0, 20)(step, 1000) for step in (10, 20, 30, 40)] == [0, 0.5, 1, 1]
    assert AlphaSchedule(100)(50, 50) == 0
    assert [AlphaSchedule()(step, 250) for step in (49, 50, 150, 250)] == pytest.approx([0, 0, 0.45, 0.9])


def test_steps_below_one_are_a_share_of_the_training():
    alpha = AlphaSchedule(num_ntp_steps=0.25, final=0.8, num_rise_steps=0.5)
    assert [alpha(step, 40) for step in (0, 9, 10, 15, 20, 30, 40)] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.8, 0.8])
    assert [alpha(step, 4_000) for step in (999, 2_000, 3_000)] == pytest.approx([0, 0.4, 0.8])
    assert [AlphaSchedule(0.2, 1.0, 0)(step, 13) for step in (2, 3)] == [0, 1]  # 2.6 is nearest to 3
    assert AlphaSchedule(1, 1.0, 0)(0, 10) == 0  # one step
    assert AlphaSchedule(1, 1.0, 0)(1, 10) == 1
    assert AlphaSchedule(0.2, 1.0, 0)(0, 2) == 1  # a share of a training too short for it is none


@pytest.mark.parametrize("options", [{"num_ntp_steps": 1.5}, {"num_rise_steps": -1}, {"num_ntp_steps": -0.1}])
def test_numbers_of_steps_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="shares below 1 or whole numbers of 0 or more, got AlphaSchedule"):
        AlphaSchedule(**options)


def test_two_phase_learning_rate():
    phases = TwoPhaseLearningRate(num_ntp_steps=100)
    rates = [phases.rate(step, 1100) for step in (0, 99, 100, 600, 1100)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 0.5e-5, 0.0])
    by_share = TwoPhaseLearningRate(num_ntp_steps=0.25)
    assert [by_share.rate(step, 8) for step in (1, 2, 5, 8)] == pytest.approx([1e-4, 1e-5, 0.5e-5, 0.0])


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plain_ratio": 1.2}, r"plain_ratio must be in \[0, 1\], got 1.2"),
        ({"token_dropout": 1.0}, r"token_dropout must be in"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"scale": 0.5}, r"scale must be in \[1, 100\]"),
        (
            {"tasks": ["translate"]},
            r"tasks must be some of \['continuation', 'reconstruction', 'soft_prompt', 'summary'\]",
        ),
        ({"tasks": []}, r"tasks must be some of"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        GemLoss(model, **options)


def test_a_model_without_gem_is_refused(make_base):
    from sentence_transformers import SentenceTransformer

    with pytest.raises(ValueError, match="first module is a GemTransformer, got Transformer"):
        GemLoss(SentenceTransformer(str(make_base())))
    with pytest.raises(ValueError, match="first module is a GemTransformer, got NoneType"):
        GemLoss(GemTransformer(str(make_base())))


def test_labels_are_refused(model):
    with pytest.raises(ValueError, match=r"label or score column.*remove_columns"):
        GemLoss(model, alpha=0.5)([model.preprocess(CORPUS)], torch.tensor([1.0]))


def test_a_model_that_changes_its_logits_in_a_way_not_known_is_refused(model):
    model[0].model.config.logits_scaling = 4.0  # read by our loss, not by a Llama
    with pytest.raises(ValueError, match=r"by the model itself, but .* by its output head"):
        GemLoss(model)


def test_the_loss_can_be_copied_and_pickled(model):
    import copy
    import pickle

    loss = GemLoss(model, alpha=0.5, plain_ratio=1.0, token_dropout=0.0)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again.get_config_dict() == loss.get_config_dict()
        values = [each([each.model.preprocess(CORPUS)]) for each in (loss, again)]
        assert values[0].item() == values[1].item()
        values[1].backward()  # trains its own model, and not the first one
        assert all(weight.grad is None for weight in model.parameters())
        values[0].backward()
        gradients = [each.model[0].model.get_input_embeddings().weight.grad for each in (loss, again)]
        assert torch.equal(*gradients)
        model.zero_grad()


def test_a_schedule_without_a_trainer_is_refused(model):
    with pytest.raises(ValueError, match="needs a SentenceTransformerTrainer"):
        GemLoss(model)([model.preprocess(CORPUS)])


# ---- tasks of two columns


def test_summary_and_soft_prompt_put_the_second_column_behind_the_gem_tokens(model):
    columns = [["a village by the sea", "the old clock"], ["a letter came", "good news for the family"]]
    texts = [split_rows(*model.preprocess(column).values(), model[0].gem_token_ids) for column in columns]
    suffixes = [suffix[1:] for suffix in texts[1]]
    rows, prefixes = GemLoss(model, tasks=["summary"], plain_ratio=0.0).build_rows(texts[0], suffixes=suffixes)
    for (row, labels), prefix, text, suffix in zip(rows, prefixes, texts[0], suffixes, strict=True):
        assert row.tolist() == [*text.tolist(), *model[0].gem_token_ids, *suffix.tolist()]
        assert labels.tolist() == [*text.tolist(), -100, -100, *suffix.tolist()]
        assert prefix.tolist() == text.tolist()
    rows, prefixes = GemLoss(model, tasks=["soft_prompt"], plain_ratio=1.0).build_rows(texts[0], suffixes=suffixes)
    for (row, _), prefix, text, suffix in zip(rows, prefixes, texts[0], suffixes, strict=True):
        assert prefix.tolist() == [*text.tolist(), *suffix.tolist()]
        assert row.tolist() == [*prefix.tolist(), *model[0].gem_token_ids]


def test_prefix_and_suffix_are_shortened_to_fit():
    prefix, suffix = torch.arange(20), torch.arange(100, 120)
    for max_length, sizes in ((50, (20, 20)), (30, (15, 15)), (36, (18, 18)), (24, (12, 12))):
        assert tuple(map(len, fit_pair(prefix, suffix, max_length))) == sizes
    assert tuple(map(len, fit_pair(prefix[:5], suffix, 20))) == (5, 15)
    assert tuple(map(len, fit_pair(prefix, suffix[:5], 20))) == (15, 5)


def test_a_task_of_two_columns_needs_two(model):
    loss = GemLoss(model, tasks=["summary"], alpha=0.0)
    value = loss([model.preprocess(CORPUS[:4]), model.preprocess(CORPUS[4:])]).item()
    assert value == pytest.approx(math.log(model[0].model.config.vocab_size), abs=0.2)
    with pytest.raises(ValueError, match=r"take two columns, prefix and suffix, but there are 1"):
        loss([model.preprocess(CORPUS)])


CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def test_messages_become_prompt_and_answer(make_model):
    tokenizer = make_model(chat_template=CHAT).tokenizer
    messages = [
        {"role": "user", "content": "Where is the boat?"},
        {"role": "assistant", "content": "By the sea."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "On the river."},
    ]
    assert split_messages({"messages": messages}, tokenizer) == {
        # without the first <bos>, which the tokenizer adds
        "prompt": "user: Where is the boat?<eos><bos>assistant: By the sea.<eos><bos>user: And now?<eos>"
        "<bos>assistant: ",
        "answer": "On the river.<eos>",
    }
    with pytest.raises(ValueError, match=r"roles are \['user', 'assistant', 'user'\]"):
        split_messages({"messages": messages[:3]}, tokenizer)
    with pytest.raises(ValueError, match="Chat messages need a chat template"):
        split_messages({"messages": messages}, make_model().tokenizer)
    tokenizer.chat_template = CHAT.replace("<bos>assistant", "assistant")
    with pytest.raises(ValueError, match="does not write the conversation with the answer"):
        split_messages({"messages": messages}, tokenizer)


# ---- the trainer


def test_data_sets_whose_names_mean_other_tasks_are_refused_where_these_are_not_chosen(make_model, tmp_path):
    names = [("anchor", "positive"), ("question", "duplicate"), ("context", "summary")]
    sets = [Dataset.from_dict(dict.fromkeys(pair, CORPUS[:4])) for pair in names]

    def link(datasets: list[Dataset], **options: object) -> GemLoss:
        model = make_model()
        loss = GemLoss(model, alpha=0.5, **options)
        trainers.append(
            SentenceTransformerTrainer(
                model=model,
                args=quiet_arguments(tmp_path / "run", per_device_train_batch_size=2),
                train_dataset=dict(zip("abc", datasets, strict=False)),
                loss=loss,
            )
        )
        assert loss.trainer_link.trainer is trainers[-1]
        return loss

    trainers: list[SentenceTransformerTrainer] = []
    loss = link(sets[:2])
    assert loss.trainer_link.column_names(loss, 2) == names[0]  # neither names a task
    loss = link(sets)
    with pytest.raises(ValueError, match=r"different columns.*'context', 'summary'.*pass tasks="):
        loss([loss.model.preprocess(CORPUS[:2])] * 2)
    loss = link(sets, tasks=["reconstruction"])
    assert loss([loss.model.preprocess(CORPUS[:2])] * 2).isfinite()


# ---- views


def test_crops_are_spans_of_the_text_behind_its_special_tokens():
    row = torch.tensor([0, *range(100, 200)])
    generator = torch.Generator().manual_seed(0)
    pairs = [draw_crops(row, 1, generator) for _ in range(200)]
    lengths = []
    for span in (span for pair in pairs for span in pair):
        assert span[0] == 0
        assert torch.equal(span[1:], torch.arange(int(span[1]), int(span[1]) + len(span) - 1))
        lengths.append(len(span) - 1)
    assert (min(lengths), max(lengths)) == (10, 50)
    assert {int(span[1]) for pair in pairs for span in pair} >= {100}
    assert sum(first[1] != second[1] for first, second in pairs) > 180  # drawn independently
    assert draw_crops(row[:16], 1, generator) is None


def test_cropped_texts_are_contrasted_with_each_other_and_short_ones_by_deletion(model):
    torch.manual_seed(0)
    loss = GemLoss(model, views=["crops"], token_dropout=0.5, plain_ratio=1.0, alpha=1.0)
    gem_ids = torch.tensor(model[0].gem_token_ids)
    num = len(gem_ids)
    texts = [torch.tensor([0, *range(start, start + 60)]) for start in (100, 200)] + [torch.tensor([0, 10, 11, 12])]
    rows = torch.nn.utils.rnn.pad_sequence([torch.cat([t, gem_ids]) for t in texts], True)
    mask = torch.tensor([[1] * (len(t) + num) + [0] * (rows.shape[1] - len(t) - num) for t in texts])
    first, second = loss._build_columns([{"input_ids": rows, "attention_mask": mask}], loss._plan(), False)
    for index in (0, 1):
        for ids, _ in (first.rows[index], second.rows[index]):
            assert 7 <= len(ids) - num <= 31
            assert set(ids[1:-num].tolist()) <= set(texts[index].tolist())
        assert torch.equal(second.texts[index], texts[index])  # by which the same text is found again
    assert first.rows[2][0][:-num].tolist() == [0, 10, 11, 12]
    assert set(second.rows[2][0][1:-num].tolist()) <= {10, 11, 12}
    assert loss.get_config_dict()["views"] == ["crops"]
    with pytest.raises(ValueError, match=r"views must be some of \['deletion', 'crops'\], got 'crop'"):
        GemLoss(model, views="crop")
