"""Losses of Sentence Transformers inside GemLoss and around it, and mini-batches: the same numbers by another road."""

from __future__ import annotations

import copy

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from packaging.version import Version
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from gem_st import GemLoss
from gem_st.losses import info_nce

from ..conftest import CHECKPOINTING, CORPUS, quiet_arguments

PAIR, TRIPLET, SINGLE = (CORPUS[:4], CORPUS[4:]), (CORPUS[:3], CORPUS[3:6], CORPUS[5:8]), (CORPUS,)


def make_guide(base) -> SentenceTransformer:
    backbone = Transformer(str(base))
    backbone.tokenizer.pad_token = "<eos>"
    return SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")], device="cpu")


def make_labels(kind: str, size: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    return {
        "": None,
        "score": torch.linspace(0, 1, size, dtype=torch.float64),
        "class": torch.arange(size) % 2,
        "margin": torch.randn(size, generator=generator, dtype=torch.float64),
        "teacher": torch.randn(size, 32, generator=generator, dtype=torch.float64),
    }[kind]


def squared_error(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As ``nn.MSELoss``, of which older versions of torch take no two data types."""
    return (scores - labels).square().mean()


INNER = {
    "mnrl": (lambda model, _: losses.MultipleNegativesRankingLoss(model), TRIPLET, ""),
    "cached mnrl": (lambda model, _: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), TRIPLET, ""),
    "gist": (lambda model, guide: losses.GISTEmbedLoss(model, guide), TRIPLET, ""),
    "cached gist": (lambda model, guide: losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=2), PAIR, ""),
    "cosent": (lambda model, _: losses.CoSENTLoss(model), PAIR, "score"),
    "cosine": (lambda model, _: losses.CosineSimilarityLoss(model, squared_error), PAIR, "score"),
    "contrastive": (lambda model, _: losses.ContrastiveLoss(model), PAIR, "class"),
    "batch hard": (lambda model, _: losses.BatchHardTripletLoss(model), SINGLE, "class"),
    "triplet": (lambda model, _: losses.TripletLoss(model), TRIPLET, ""),
    "mse": (lambda model, _: losses.MSELoss(model), SINGLE, "teacher"),
    "embed distill": (lambda model, _: losses.EmbedDistillLoss(model), SINGLE, "teacher"),
    "orthogonal": (lambda model, _: losses.GlobalOrthogonalRegularizationLoss(model), PAIR, ""),
    "margin mse": (lambda model, _: losses.MarginMSELoss(model), TRIPLET, "margin"),
    "mega batch": (lambda model, _: losses.MegaBatchMarginLoss(model, mini_batch_size=2), PAIR, ""),
    "matryoshka": (
        lambda model, _: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 8]),
        TRIPLET,
        "",
    ),
    "matryoshka, cached": (
        lambda model, _: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), [32, 8]
        ),
        TRIPLET,
        "",
    ),
}


def gradients(loss: torch.nn.Module, model: SentenceTransformer, columns, labels=None) -> tuple[float, dict]:
    model.zero_grad()
    torch.manual_seed(0)
    value = loss([model.preprocess(list(column)) for column in columns], labels)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(first: tuple[float, dict], second: tuple[float, dict], atol: float = 1e-5) -> None:
    assert first[0] == pytest.approx(second[0], abs=atol)
    for name in {*first[1], *second[1]} - {"0.logit_scale"}:
        gradients = [side[1].get(name, torch.zeros(())) for side in (first, second)]  # none where a part is not used
        largest = max(gradient.abs().max().item() for gradient in gradients)
        assert (gradients[0] - gradients[1]).abs().max() <= atol * max(1.0, largest), name


@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_an_inner_loss_gives_what_it_gives_alone(make_model, make_base, name, freeze_base):
    make, columns, kind = INNER[name]
    if name == "cached gist" and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("CachedGISTEmbedLoss moves texts to a device before sentence-transformers 6.2")
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base).double()
    guide = make_guide(make_base("qwen3"))
    guide.max_seq_length = 100  # has the losses with a guide tokenise for it; alone, they would show it GEM tokens
    labels = make_labels(kind, len(columns[0]))
    alone = gradients(make(model, guide), model, columns, labels)
    inside = gradients(GemLoss(model, inner=make(model, guide), alpha=1.0, plain_ratio=1.0), model, columns, labels)
    assert_same(inside, alone)
    assert inside[0] != 0


def test_a_guide_with_the_same_tokenizer_sees_no_gem_tokens(make_model, make_base):
    model, guide = make_model(num_gem_tokens=2, freeze_base=True), make_guide(make_base("qwen3"))
    columns = [model.preprocess(list(column)) for column in PAIR]
    values = []
    for limit in (256, 100):  # its own features, and texts tokenised anew
        guide.max_seq_length = limit
        inner = losses.GISTEmbedLoss(model, guide)
        assert inner.must_retokenize == (limit == 100)
        values.append(GemLoss(model, inner=inner).eval()(columns).item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("name", ["mnrl", "cached mnrl", "matryoshka, cached"])
def test_next_token_prediction_stays_beside_an_inner_loss(make_model, name):
    make, columns, _ = INNER[name]
    model = make_model(num_gem_tokens=2)
    options = {"inner": make(model, None), "plain_ratio": 0.5}
    both, ntp, alone = (gradients(GemLoss(model, alpha=a, **options), model, columns) for a in (0.25, 0.0, 1.0))
    assert ntp[0] > 1
    expected = {key: 0.75 * ntp[1][key] + 0.25 * alone[1][key] for key in ntp[1]}
    assert_same(both, (0.75 * ntp[0] + 0.25 * alone[0], expected))


def test_one_column_gets_a_second_view_for_an_inner_loss(make_model):
    model = make_model()
    inner = losses.MultipleNegativesRankingLoss(model, scale=10.0)
    inside = gradients(GemLoss(model, inner=inner, alpha=1.0), model, SINGLE)
    own = gradients(GemLoss(model, scale=10.0, alpha=1.0), model, SINGLE)
    assert_same(inside, own)


def test_embeddings_as_wide_as_the_text_is_long_are_not_trimmed(make_model):
    """Losses that cut mini-batches trim every tensor that is as wide as the tokens to the longest of a mini-batch."""
    model = make_model().double()
    long, short = "village sea " * 40, "sea"
    columns = ([long, short, "boat", "city"], [short, "market", "light", "read"])
    model.max_seq_length = 32 + 1
    make = losses.CachedMultipleNegativesRankingLoss
    inside = GemLoss(model, inner=make(model, mini_batch_size=2), alpha=1.0, plain_ratio=1.0)
    assert_same(gradients(inside, model, columns), gradients(make(model, mini_batch_size=2), model, columns))


def test_a_second_backward_pass_gives_the_same_gradients(make_model):
    model = make_model().double()
    for inner in (losses.MultipleNegativesRankingLoss(model), losses.CachedMultipleNegativesRankingLoss(model)):
        value = GemLoss(model, inner=inner, alpha=0.5)([model.preprocess(column) for column in PAIR])
        weight = model[0].model.get_input_embeddings().weight
        (first,) = torch.autograd.grad(value, [weight], retain_graph=True)
        (second,) = torch.autograd.grad(value, [weight])
        torch.testing.assert_close(first, second)


def test_parameters_of_an_inner_loss_are_trained(make_model):
    model = make_model()
    inner = losses.SoftmaxLoss(model, embedding_dimension=32, num_labels=2)
    loss = GemLoss(model, inner=inner, alpha=0.5, plain_ratio=1.0)
    model.train()
    loss([model.preprocess(column) for column in PAIR], torch.tensor([0, 1, 0, 1])).backward()
    assert inner.classifier.weight.grad.abs().max() > 0
    assert any(parameter is inner.classifier.weight for parameter in loss.parameters())


@pytest.mark.parametrize("freeze_base", [False, True])
def test_matryoshka_around_gem(make_model, freeze_base):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base).eval()
    columns = [model.preprocess(column) for column in PAIR]
    loss = losses.MatryoshkaLoss(model, GemLoss(model, alpha=1.0, plain_ratio=1.0, scale=10.0), [32, 8])
    embeddings = [model.encode(column, convert_to_tensor=True) for column in PAIR]
    expected = sum(info_nce(*(embedding[:, :dim] for embedding in embeddings), 10.0) for dim in (32, 8))
    torch.testing.assert_close(loss(columns, None), expected, atol=1e-5, rtol=1e-5)


# ---- mini-batches


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_mini_batches_give_the_gradients_of_the_batch(make_model, architecture, freeze_base, size):
    model = make_model(architecture, num_gem_tokens=2, freeze_base=freeze_base).double()
    options = {"alpha": 0.5, "plain_ratio": 0.5}
    whole = gradients(GemLoss(model, **options), model, SINGLE)
    parts = gradients(GemLoss(model, mini_batch_size=size, **options), model, SINGLE)
    assert_same(parts, whole)
    torch.testing.assert_close(parts[1]["0.logit_scale"], whole[1]["0.logit_scale"], atol=1e-5, rtol=1e-4)


def test_mini_batches_with_dropout_repeat_their_draws(make_model):
    model = make_model(freeze_base=True, lora_kwargs={"lora_dropout": 0.3})
    loss = GemLoss(model, alpha=1.0, mini_batch_size=3)
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n and p.requires_grad)

    def value() -> torch.Tensor:
        torch.manual_seed(0)
        return loss([model.preprocess(CORPUS)])

    (gradient,) = torch.autograd.grad(value(), [weight])
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight += 1e-3 * direction
        above = value()
        weight -= 2e-3 * direction
        below = value()
    assert (above - below).item() / 2e-3 == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_mini_batches_hold_no_more_than_one_of_them(make_model):
    """What the forward pass saves for the backward pass grows with the batch by its embeddings alone."""
    model = make_model().train()

    def saved(loss: GemLoss, num_texts: int) -> int:
        sizes = []
        count = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss([model.preprocess(CORPUS * (num_texts // 8))])
        return sum(sizes)

    plain, parts = GemLoss(model, alpha=0.5), GemLoss(model, alpha=0.5, mini_batch_size=8)
    assert saved(plain, 64) > 5 * saved(plain, 8)
    assert saved(parts, 64) < saved(plain, 8)


def test_the_mini_batch_size_of_an_inner_loss_is_taken_over(make_model):
    model = make_model()
    inner = losses.MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5), [8])
    assert GemLoss(model, inner=inner).mini_batch_size == 5
    assert GemLoss(model, inner=losses.CoSENTLoss(model)).mini_batch_size is None
    with pytest.raises(ValueError, match="mini_batch_size must be a whole number"):
        GemLoss(model, mini_batch_size=0)


# ---- in the trainer


@pytest.mark.parametrize("options", [CHECKPOINTING, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_mini_batches_go_with_other_savings(make_model, tmp_path, options):
    weights = []
    for size in (None, 2):
        model = make_model(num_gem_tokens=2)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=make_arguments(tmp_path, learning_rate=1e-3, optim="sgd", **options),
            train_dataset=Dataset.from_dict({"text": CORPUS * 2}),
            loss=GemLoss(model, alpha=0.5, mini_batch_size=size),
        )
        trainer.train()
        weights.append(model[0].model.get_input_embeddings().weight.detach())
    torch.testing.assert_close(*weights, atol=1e-3 if "bf16" in options else 1e-5, rtol=1e-4)


def make_arguments(tmp_path, **kwargs):
    return quiet_arguments(
        tmp_path,
        **{"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, **kwargs},
    )


def test_a_dict_of_data_sets_and_losses_with_prompts_and_no_duplicates(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    data = {
        "pairs": Dataset.from_dict({"anchor": PAIR[0] * 2, "positive": PAIR[1] * 2}),
        "scored": Dataset.from_dict({"a": PAIR[0], "b": PAIR[1], "score": [0.1, 0.9, 0.5, 0.3]}),
        "texts": Dataset.from_dict({"text": CORPUS}),
        "articles": Dataset.from_dict({"context": PAIR[0], "summary": PAIR[1]}),
    }
    loss = {
        "pairs": GemLoss(model, inner=losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), alpha=0.5),
        "scored": GemLoss(model, inner=losses.CoSENTLoss(model), alpha=0.5),
        "texts": losses.MatryoshkaLoss(model, GemLoss(model, alpha=0.5), [32, 16]),
        "articles": GemLoss(model, alpha=0.5, plain_ratio=0.0),
    }
    arguments = make_arguments(
        tmp_path,
        max_steps=12,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts={"pairs": {"anchor": "query: ", "positive": "document: "}},
    )
    before = copy.deepcopy(model.state_dict())
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "ntp" in entry]
    assert all(0 < entry["ntp"] < 20 and entry["contrastive"] >= 0 for entry in entries)
    assert {f"eval_{name}_loss" for name in data} <= set(trainer.evaluate())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_router_behind_gem_sends_columns_their_ways(make_model, tmp_path):
    gem = make_model()[0]
    router = Router.for_query_document([Dense(32, 16)], [Dense(32, 16)])
    model = SentenceTransformer(modules=[gem, router], device="cpu").train()
    pairs = Dataset.from_dict({"question": PAIR[0], "answer": PAIR[1]})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=make_arguments(tmp_path, router_mapping={"question": "query", "answer": "document"}, learning_rate=1e-3),
        train_dataset=pairs,
        loss=GemLoss(model, alpha=0.5, inner=losses.MultipleNegativesRankingLoss(model)),
    )
    before = [
        dense.linear.weight.clone() for dense in (router.sub_modules["query"][0], router.sub_modules["document"][0])
    ]
    trainer.train()
    after = [dense.linear.weight for dense in (router.sub_modules["query"][0], router.sub_modules["document"][0])]
    assert all(not torch.equal(*weights) for weights in zip(before, after, strict=True))
    expected = info_nce(
        model.encode_query(PAIR[0], convert_to_tensor=True),
        model.encode_document(PAIR[1], convert_to_tensor=True),
        20.0,
    )
    features = [{**model.preprocess(c), "task": task} for c, task in zip(PAIR, ("query", "document"), strict=True)]
    result = GemLoss(model.eval(), alpha=1.0, plain_ratio=1.0, scale=20.0)(features)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


# ---- what is refused


def test_inner_losses_that_cannot_be_are_refused(make_model):
    model, other = make_model(), make_model()
    mnrl = losses.MultipleNegativesRankingLoss
    for inner, message in (
        (losses.ContrastiveTensionLoss(model), "ContrastiveTensionLoss needs copies .* it alone, or beside GemLoss"),
        (mnrl(other), "made with another model"),
        (mnrl, "must be a loss of Sentence Transformers made with the model, got MultipleNegativesRankingLoss"),
        (GemLoss(model), "got GemLoss"),
        (torch.nn.MSELoss(), "holds no model"),
    ):
        with pytest.raises(ValueError, match=message):
            GemLoss(model, inner=inner)
    for option in ({"scale": 30.0}, {"gather_across_devices": True}):
        with pytest.raises(ValueError, match="set those of `loss`"):
            GemLoss(model, inner=mnrl(model), **option)


def test_an_inner_loss_used_elsewhere_and_tasks_of_two_columns_are_refused(make_model):
    model = make_model()
    inner = losses.MultipleNegativesRankingLoss(model)
    GemLoss(model, inner=inner)
    with pytest.raises(ValueError, match="To use it elsewhere as well, make another one"):
        inner([model.preprocess(column) for column in PAIR], None)
    with pytest.raises(ValueError, match="of which `loss` would see one only"):
        GemLoss(model, inner=inner, tasks=["summary"])
    with pytest.raises(ValueError, match=r"must be a whole number of 1 or more, got 2\.5"):
        GemLoss(model, mini_batch_size=2.5)


def test_a_loss_with_an_inner_one_can_be_copied(make_model):
    model = make_model()
    loss = GemLoss(model, inner=losses.MultipleNegativesRankingLoss(model), alpha=1.0, plain_ratio=1.0).eval()
    again = copy.deepcopy(loss)
    features = [model.preprocess(column) for column in PAIR]
    assert again(features).item() == pytest.approx(loss(features).item(), rel=1e-6)


@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside GemLoss"])
def test_contrastive_tension_trains_a_gem_model(make_model, tmp_path, freeze_base, beside):
    model = make_model(freeze_base=freeze_base)
    loss = losses.ContrastiveTensionLoss(model)
    data = Dataset.from_dict({"first": CORPUS, "second": CORPUS, "label": [1, 0] * 4})
    if beside:
        data = {"pairs": data, "texts": Dataset.from_dict({"text": CORPUS})}
        loss = {"pairs": loss, "texts": GemLoss(model, alpha=0.5)}
    before = model.encode(CORPUS, convert_to_tensor=True)
    args = make_arguments(tmp_path, max_steps=4, learning_rate=1e-2)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
    after = model.encode(CORPUS, convert_to_tensor=True)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3


def test_losses_that_take_no_gem_model(make_model, make_base):
    """Which docs/losses.md says; once Sentence Transformers takes one, the sentence goes."""
    model = make_model()
    inner = losses.MultipleNegativesRankingLoss(model)
    for make in (lambda: losses.AdaptiveLayerLoss(model, inner), lambda: losses.Matryoshka2dLoss(model, inner, [32])):
        with pytest.raises(AssertionError):
            make()


@pytest.mark.parametrize("is_subclass", [False, True])
def test_losses_that_need_tokens_are_refused_and_so_are_their_kin(make_model, make_base, is_subclass):
    model = make_model()
    kind = type("Own", (losses.DenoisingAutoEncoderLoss,), {}) if is_subclass else losses.DenoisingAutoEncoderLoss
    inner = kind(model, str(make_base()), tie_encoder_decoder=False)
    with pytest.raises(ValueError, match=r"can be no `loss` of GemLoss. GemLoss\(tasks="):
        GemLoss(model, loss=inner)
