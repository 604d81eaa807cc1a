"""GemLoss in the Sentence-Transformers trainer: logs, schedules, columns, and what is refused before the first step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

from gem_st import AlphaSchedule, GemLoss, TwoPhaseLearningRate
from gem_st.training import last_checkpoint

from ..conftest import CHECKPOINTING, CORPUS, quiet_arguments


def make_trainer(model, folder: Path, dataset=None, *, loss=None, callbacks=None, eval_dataset=None, **kwargs):
    arguments = quiet_arguments(
        folder,
        **{"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", **kwargs},
    )
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": CORPUS}) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        loss=loss or GemLoss(model),
        callbacks=callbacks,
    )


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_log_shows_the_parts_unweighted(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    trainer = make_trainer(model, tmp_path, loss=GemLoss(model, alpha=AlphaSchedule(2, 1.0, 2)))
    trainer.train()
    assert logged(trainer, "alpha") == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    for loss, ntp, contrastive, alpha in zip(
        *(logged(trainer, key) for key in ("loss", "ntp", "contrastive", "alpha")), strict=True
    ):
        assert loss == pytest.approx((1 - alpha) * ntp + alpha * contrastive, abs=2e-3)
        assert ntp > 1
        assert contrastive > 0
    scales = logged(trainer, "scale")
    assert scales[0] == pytest.approx(20.0, abs=1e-3)
    assert scales[-1] != scales[0]


def test_alpha_follows_optimizer_steps_under_gradient_accumulation(make_model, tmp_path):
    model = make_model()
    trainer = make_trainer(
        model, tmp_path, loss=GemLoss(model, alpha=AlphaSchedule(3, 1.0, 0)), gradient_accumulation_steps=3
    )
    trainer.train()
    assert logged(trainer, "alpha") == [0, 0, 0, 1, 1, 1]


def test_alpha_and_rate_go_on_after_a_resume(make_model, tmp_path):
    def run(model, folder, **kwargs):
        trainer = make_trainer(
            model,
            folder,
            loss=GemLoss(model, alpha=AlphaSchedule(2, 1.0, None)),
            callbacks=[TwoPhaseLearningRate(num_ntp_steps=2)],
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(**kwargs)
        return trainer

    straight = run(make_model(), tmp_path / "run")
    resumed = run(make_model(), tmp_path / "other", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected = [0, 0, 0, 0.25, 0.5, 0.75]
    assert logged(straight, "alpha") == expected
    assert logged(resumed, "alpha") == expected  # the first three come with the checkpoint
    rates = logged(straight, "learning_rate")
    assert logged(resumed, "learning_rate") == pytest.approx(rates)
    assert rates[:4] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5 * 0.5 * (1 + math.cos(math.pi / 4))])


def test_the_whole_path_of_the_readme_on_a_text_file(make_model, tmp_path):
    (tmp_path / "wiki.txt").write_text("\n".join(CORPUS))
    data = load_dataset("text", data_files=str(tmp_path / "wiki.txt"), split="train", cache_dir=str(tmp_path / "cache"))
    model = make_model(num_gem_tokens=4)
    before = model.encode(CORPUS, convert_to_tensor=True)
    make_trainer(model, tmp_path / "out", data, learning_rate=1e-3).train()
    assert (model.encode(CORPUS, convert_to_tensor=True) - before).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neo"])
def test_training_lowers_both_losses(make_model, tmp_path, architecture):
    torch.manual_seed(0)
    model = make_model(architecture, num_gem_tokens=2)
    loss = GemLoss(model, alpha=0.5)
    model.eval()
    features = [model.preprocess(CORPUS)]
    before = loss(features).item()
    make_trainer(model, tmp_path, loss=loss, max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3).train()
    model.eval()
    assert loss([model.preprocess(CORPUS)]).item() < 0.8 * before


def test_pairs_triplets_and_datasets_by_name(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    columns = {"anchor": CORPUS[:4], "positive": CORPUS[4:], "negative": CORPUS[2:6]}
    pairs = Dataset.from_dict({key: columns[key] for key in ("anchor", "positive")})
    triplets = Dataset.from_dict(columns)
    data = {"pairs": pairs, "triplets": triplets, "texts": Dataset.from_dict({"text": CORPUS})}
    trainer = make_trainer(model, tmp_path, data, eval_dataset=data, loss=GemLoss(model, alpha=0.5))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert all(after[f"eval_{name}_loss"] < before[f"eval_{name}_loss"] for name in data)


def test_evaluation_loss_is_deterministic_and_at_the_last_alpha(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    data = Dataset.from_dict({"text": CORPUS})
    trainer = make_trainer(model, tmp_path, eval_dataset=data, loss=GemLoss(model, alpha=AlphaSchedule(2, 0.8)))
    trainer.train()
    first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == second
    assert logged(trainer, "eval_alpha")[-1] == pytest.approx(0.8, abs=1e-4)
    assert first == pytest.approx(
        0.2 * logged(trainer, "eval_ntp")[-1] + 0.8 * logged(trainer, "eval_contrastive")[-1], abs=1e-3
    )


def test_a_loss_given_as_a_function_and_gradient_checkpointing(make_model, tmp_path):
    losses = []
    for name, options in (("with", CHECKPOINTING), ("without", {})):
        model = make_model(num_gem_tokens=2)
        torch.manual_seed(0)
        trainer = make_trainer(model, tmp_path / name, loss=GemLoss, **options)
        trainer.train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == bool(options)
        assert len(logged(trainer, "alpha")) == 6
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_loss_in_two_trainers_follows_the_one_that_runs(make_model, tmp_path):
    model = make_model()
    loss = GemLoss(model, alpha=AlphaSchedule(1, 1.0, 0))
    first, second = (make_trainer(model, tmp_path / name, loss=loss) for name in ("a", "b"))
    first.train()
    assert logged(first, "alpha") == [0, 1, 1, 1, 1, 1]
    assert not logged(second, "alpha")


def test_another_loss_of_sentence_transformers_trains_it_too(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    pairs = Dataset.from_dict({"anchor": CORPUS[:4], "positive": CORPUS[4:]})
    trainer = make_trainer(
        model, tmp_path, pairs, loss=MultipleNegativesRankingLoss(model), max_steps=20, learning_rate=5e-3
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": []}, "training set has no rows"),
        ({"text": ["a", "b"], "number": [1, 2]}, "Column 'number' of the training set holds int64"),
        (
            {"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]},
            r"Column 'score' of the training set holds float64.*filter pairs",
        ),
        ({"text": [["a"], ["b"]]}, "Column 'text' of the training set holds"),
        ({"text": ["a", None, "b"]}, "Row 1 of column 'text' of the training set is None"),
        ({"text": ["a", "b"], "empty": ["", " "]}, "Column 'empty' of the training set is empty"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 2}, r"of the training set holds chat.*split_messages"),
    ],
)
def test_a_dataset_that_cannot_be_learned_from_is_refused_when_the_trainer_is_made(
    make_model, tmp_path, columns, message
):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(), tmp_path, Dataset.from_dict(columns))
    with pytest.raises(ValueError, match=message.replace("training", "evaluation")):
        make_trainer(make_model(), tmp_path, eval_dataset=Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "has one row, and nothing to tell it from"),
        ({"text": ["a"] * 8}, "first 8 rows of the training set are all the same, 'a'"),
        ({"anchor": ["a"] * 8, "positive": ["b"] * 8}, "are all the same"),
    ],
)
def test_texts_that_cannot_be_told_apart_are_refused(make_model, tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(), tmp_path, Dataset.from_dict(columns))


def test_batches_of_one_have_no_negatives(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="no negatives to tell it from"):
        make_trainer(model, tmp_path, per_device_train_batch_size=1)
    one = Dataset.from_dict({"text": CORPUS[:1]})
    make_trainer(model, tmp_path, one, per_device_train_batch_size=1, loss=GemLoss(model, alpha=0.0)).train()
    hard = Dataset.from_dict({"anchor": CORPUS[:4], "positive": CORPUS[4:], "negative": CORPUS[2:6]})
    trainer = make_trainer(model, tmp_path, hard, per_device_train_batch_size=1, loss=GemLoss(model, alpha=1.0))
    trainer.train()
    assert min(logged(trainer, "contrastive")) > 0


def test_tasks_of_two_columns_need_them_before_the_first_step(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"take two columns, prefix and suffix, but there are \['text'\]"):
        make_trainer(model, tmp_path, loss=GemLoss(model, tasks=["summary"]))


def test_tasks_chosen_beside_a_frozen_base_are_trained_and_on_the_card(make_model, tmp_path):
    model = make_model(freeze_base=True)
    chosen = GemLoss(model, tasks=["reconstruction"])
    assert (chosen.plain_ratio, chosen.alpha) == (0.5, 0.7)
    loss = GemLoss(model)
    data = Dataset.from_dict({"context": CORPUS[:4], "summary": CORPUS[4:]})
    make_trainer(model, tmp_path, data, loss=loss, max_steps=1).train()
    assert loss.get_config_dict() == {"plain_ratio": 0.5, "tasks": ["summary"], "token_dropout": 0.85, "alpha": 0.7}


def test_an_alpha_out_of_range_is_refused_at_the_first_step(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2.0"):
        make_trainer(model, tmp_path, loss=GemLoss(model, alpha=lambda step, last_step: 2.0)).train()


def test_a_schedule_longer_than_the_training_is_warned_of(make_model, tmp_path, warnings_of_transformers):
    model = make_model()
    make_trainer(model, tmp_path, max_steps=1, loss=GemLoss(model, alpha=AlphaSchedule(num_ntp_steps=100))).train()
    assert "alpha stays 0 for all 1 steps" in warnings_of_transformers.text


@pytest.mark.parametrize("freeze_base", [False, True])
def test_columns_named_for_a_task_train_it(make_model, tmp_path, freeze_base):
    """The suffix is a next-token target, and the contrastive part has two views of the prefix."""
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base)
    data = Dataset.from_dict({"prompt": CORPUS[:4] * 2, "answer": CORPUS[4:] * 2})
    trainer = make_trainer(model, tmp_path, data, loss=GemLoss(model, alpha=0.5))
    trainer.train()
    used = trainer.loss.get_config_dict()
    assert (used["tasks"], used["plain_ratio"]) == (["soft_prompt"], 0.5 if freeze_base else 0.8)
    for names, options in (
        (["prompt", "answer"], {"loss": MultipleNegativesRankingLoss(model)}),
        (["anchor", "positive"], {}),
    ):
        other = make_trainer(
            model,
            tmp_path,
            data.rename_columns(dict(zip(data.column_names, names, strict=True))),
            loss=GemLoss(model, alpha=0.5, plain_ratio=0.5, **options),
            max_steps=1,
        )
        other.train()
        assert other.loss.get_config_dict()["tasks"] == ["reconstruction", "continuation"]
    assert max(logged(trainer, "ntp")) > 0
    assert min(logged(trainer, "contrastive")) > 0


def test_training_stops_at_a_loss_that_is_no_number_and_keeps_the_last_checkpoint(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    loss = GemLoss(model, alpha=lambda step, last_step: 0.5)
    trainer = make_trainer(model, tmp_path, loss=loss, save_strategy="steps", save_steps=2, save_only_model=False)

    saved: dict[str, torch.Tensor] = {}

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                saved.update({name: weight.detach().clone() for name, weight in model.named_parameters()})
            if state.global_step == 3:
                next(model.parameters()).data.fill_(float("nan"))

    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 4 of 6 .*checkpoint-2 with a lower"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    again = SentenceTransformer(str(tmp_path / "checkpoint-2"), trust_remote_code=True, device="cpu")
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, saved[name])


def test_texts_that_do_not_fit_are_warned_of(make_model, tmp_path, warnings_of_transformers):
    data = Dataset.from_dict({"text": ["sea " * 300, *CORPUS[:3]]})
    make_trainer(make_model(), tmp_path, data)
    assert "25% of the first 4 texts are longer than max_seq_length=256" in warnings_of_transformers.text


def test_streaming_data_is_trained_on_and_checked(make_model, tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, Dataset.from_dict({"text": CORPUS * 4}).to_iterable_dataset())
    trainer.train()
    assert len(logged(trainer, "ntp")) == 6


def stream_once(rows: list[dict[str, str]]) -> IterableDataset:
    """A stream that can be read once only, as of a queue or a socket."""
    left = iter(rows)

    def read():
        yield from left

    return IterableDataset.from_generator(read, features=Features({name: Value("string") for name in rows[0]}))


@pytest.mark.parametrize("columns", [["text"], ["anchor", "positive"]])
@pytest.mark.parametrize(
    ("num_rows", "change"),
    [
        (8, lambda stream: stream),
        (250, lambda stream: stream),
        (8, lambda stream: stream.map(lambda row: row, features=stream.features)),
        (30, lambda stream: stream.shuffle(seed=0, buffer_size=5)),
    ],
    ids=["short", "long", "mapped", "shuffled"],
)
def test_every_row_of_a_stream_is_trained_on_once(make_model, tmp_path, columns, num_rows, change):
    model, seen = make_model(), []
    rows = [{name: f"{name} {index}" for name in columns} for index in range(num_rows)]
    stream = change(stream_once(rows))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=quiet_arguments(tmp_path, max_steps=num_rows // 2, per_device_train_batch_size=2, save_strategy="no"),
        train_dataset=stream,
        loss=GemLoss(model, alpha=0.5),
    )
    preprocess = model[0].preprocess
    model[0].preprocess = lambda texts, **kwargs: seen.extend(texts) or preprocess(texts, **kwargs)
    trainer.train()
    assert trainer.state.global_step == num_rows // 2
    assert sorted(seen) == sorted(text for row in rows for text in row.values())


def test_the_rows_of_a_stream_are_checked_as_they_are_trained_on(make_model, tmp_path, warnings_of_transformers):
    def start(rows):
        args = quiet_arguments(tmp_path, max_steps=len(rows) // 4, per_device_train_batch_size=4, save_strategy="no")
        model = make_model()
        data = {"model": model, "args": args, "train_dataset": stream_once(rows), "loss": GemLoss(model)}
        SentenceTransformerTrainer(**data).train()

    with pytest.raises(ValueError, match="The first 100 rows of the stream are all the same"):
        start([{"text": "a"}] * 120)
    with pytest.raises(ValueError, match=r"Input 2 of 4 is None \(NoneType\)"):
        start([{"text": "a"}, {"text": "b"}, {"text": None}, {"text": "c"}])
    start([{"text": "a"}] * 4 + [{"text": f"a {index}"} for index in range(116)])  # the same at first
    start([{"text": "sea " * 300}, *({"text": f"a {index}"} for index in range(119))])
    assert "1% of the first 100 texts fill max_seq_length=256 tokens" in warnings_of_transformers.text


def test_accumulated_batches_are_a_mean_of_means_and_mini_batches_are_not(make_model, tmp_path):
    """Which docs/losses.md says of the next-token loss; the reference is autograd on the model's own loss."""
    texts = ["He.", "A dog.", "It.", "She.", *CORPUS[:4]]  # few targets, then many
    columns = {"text": texts}

    def gradient(weigh) -> torch.Tensor:
        model = make_model().train()
        losses = []
        for part in (texts[:4], texts[4:]):
            rows = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in part]
            own = [model[0].model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
            losses.append((torch.stack(own).sum(), sum(len(row) - 1 for row in rows)))
        weigh(losses).backward()
        return model[0].model.lm_head.weight.grad

    def step(**options) -> torch.Tensor:
        model = make_model()
        before = model[0].model.lm_head.weight.detach().clone()
        args = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "save_strategy": "no"}
        size = options.pop("mini_batch_size", None)
        SentenceTransformerTrainer(
            model=model,
            args=quiet_arguments(tmp_path, **args, **options),
            train_dataset=Dataset.from_dict(columns).to_iterable_dataset(),  # in this order
            loss=GemLoss(model, alpha=0.0, plain_ratio=1.0, mini_batch_size=size),
        ).train()
        return (before - model[0].model.lm_head.weight.detach()) / 0.1

    whole = gradient(lambda losses: sum(total for total, _ in losses) / sum(num for _, num in losses))
    means = gradient(lambda losses: sum(total / num for total, num in losses) / 2)
    assert (whole - means).abs().max() > 1e-2 * whole.abs().max()
    one_batch, in_parts = (step(per_device_train_batch_size=8, mini_batch_size=size) for size in (None, 4))
    accumulated = step(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for result, expected in ((one_batch, whole), (in_parts, whole), (accumulated, means)):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-3)
