"""Real, trained models: the embedded base, and small public ones where they are at hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModelForCausalLM, set_seed

from gem_st import GemLoss, GemTransformer
from gem_st.evaluation import perplexity

from .conftest import BASE_8M, ROOT, SHARED, quiet_arguments

DATA = ROOT / "examples" / "data"
SMALL_MODELS = ["stories260K", "stories3M", "tinystories-instruct-3M-chat"]


def train(model: SentenceTransformer, texts: list[str], folder: Path, steps: int, rate: float) -> None:
    arguments = quiet_arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=rate,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        save_strategy="no",
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        loss=GemLoss(model),
    ).train()


def spearman(model: SentenceTransformer) -> float:
    with open(DATA / "similarity.tsv", encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file, delimiter="\t"))
    evaluator = EmbeddingSimilarityEvaluator(
        *([pair[key] for pair in pairs] for key in ("sentence1", "sentence2")),
        [float(pair["score"]) for pair in pairs],
        main_similarity="cosine",
    )
    return evaluator(model)[evaluator.primary_metric]


@pytest.mark.slow
@pytest.mark.parametrize(("freeze_base", "rate", "perplexity_bound"), [(False, 3e-4, 1.3), (True, 1e-3, 1.0)])
def test_the_embedded_base_becomes_an_embedder_and_stays_a_generator(tmp_path, freeze_base, rate, perplexity_bound):
    set_seed(0)
    gem = GemTransformer(str(BASE_8M), freeze_base=freeze_base, model_kwargs={"dtype": "float32"}, max_seq_length=64)
    model = SentenceTransformer(modules=[gem], device="cpu")
    backbone = Transformer(str(BASE_8M), model_kwargs={"dtype": "float32"})
    base = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")], device="cpu")
    held_out = [json.loads(line)["text"] for line in (DATA / "passages.jsonl").read_text().splitlines()]
    texts = (DATA / "train.txt").read_text(encoding="utf-8").splitlines()
    before = spearman(base), spearman(model), perplexity(gem.model, gem.tokenizer, held_out)
    train(model, texts, tmp_path, steps=50, rate=rate)
    after = spearman(model), perplexity(gem.model, gem.tokenizer, held_out)
    assert after[0] > before[0] + 0.03  # better than mean pooling of the base ...
    assert after[0] > before[1] + 0.1  # ... and far better than the untrained GEM token
    assert after[1] <= perplexity_bound * before[2]


def test_perplexity_is_that_of_the_models_own_loss():
    model = AutoModelForCausalLM.from_pretrained(BASE_8M, dtype=torch.float32)
    gem = GemTransformer(str(BASE_8M), model_kwargs={"dtype": "float32"})
    text = "The old man opened the door and looked at the sea."
    ids = gem.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert perplexity(model, gem.tokenizer, [text, text]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least one text of two tokens"):
        perplexity(model, gem.tokenizer, [""])


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize(("num_gem_tokens", "freeze_base"), [(1, False), (4, False), (2, True)])
def test_small_public_models_train_save_and_reload(name, num_gem_tokens, freeze_base, tmp_path):
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"{name} is not at hand: set GEM_ST_SHARED to a folder that holds models/{name}")
    set_seed(0)
    gem = GemTransformer(
        str(path),
        num_gem_tokens=num_gem_tokens,
        freeze_base=freeze_base,
        model_kwargs={"dtype": "float32"},
        max_seq_length=64,
    )
    model = SentenceTransformer(modules=[gem], device="cpu")
    texts = ["One day, a little girl found a needle in her room.", "", "\U0001f600 " * 5, "word " * 1000]
    alone = np.stack([model.encode(text) for text in texts])
    np.testing.assert_allclose(model.encode(texts), alone, atol=1e-4)
    sentences = (DATA / "train.txt").read_text(encoding="utf-8").splitlines()[:64]
    train(model, sentences, tmp_path / "run", steps=3, rate=1e-2 if freeze_base else 1e-3)
    assert abs(model.encode(texts) - alone).max() > 1e-3
    model.save_pretrained(str(tmp_path / "model"))
    again = SentenceTransformer(
        str(tmp_path / "model"), trust_remote_code=True, device="cpu", model_kwargs={"dtype": "float32"}
    )
    assert np.array_equal(again.encode(texts), model.encode(texts))
    np.testing.assert_allclose(again[0].summarize(again[0].prefill(texts)).numpy(), model.encode(texts), atol=1e-4)
    prompt = "Once upon a time"
    assert again[0].generate(prompt, max_new_tokens=8) == gem.generate(prompt, max_new_tokens=8) != ""


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_prompt_and_its_continuation_make_one_text(name):
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"{name} is not at hand: set GEM_ST_SHARED to a folder that holds models/{name}")
    gem = GemTransformer(str(path))
    prompt = "Once upon a time there was a"  # the next token starts with a space
    assert gem.generate(prompt, max_new_tokens=6, do_sample=False).startswith(" ")
