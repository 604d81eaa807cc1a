"""Measures of the generator and of what GEM tokens hold."""

from __future__ import annotations

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer

from gem_st import GemLoss
from gem_st.evaluation import ReconstructionEvaluator

from ..conftest import CORPUS, quiet_arguments


def test_reconstruction_counts_whole_texts_and_character_ngrams(make_model, monkeypatch):
    model = make_model(freeze_base=True)
    evaluator = ReconstructionEvaluator(CORPUS[:4], name="held_out", batch_size=3)
    copies = iter([CORPUS[:3], CORPUS[3:4], [*CORPUS[:2], "no"], ["no"]])
    monkeypatch.setattr(model[0], "reconstruct", lambda memory: next(copies))
    assert evaluator(model) == {"held_out_exact_match": 1.0, "held_out_chrf": 100.0}
    metrics = evaluator(model)
    assert metrics["held_out_exact_match"] == 0.5
    assert 10 < metrics["held_out_chrf"] < 90
    assert evaluator.primary_metric == "held_out_chrf"
    with pytest.raises(ValueError, match="at least one text"):
        ReconstructionEvaluator([])


def test_reconstruction_can_be_learned_and_watched(make_model, tmp_path):
    """Eight sentences through eight GEM tokens of a frozen random model: more of them comes back than before."""
    model = make_model(num_gem_tokens=8, freeze_base=True, hidden_size=64, num_hidden_layers=3, lora_rank=64)
    arguments = quiet_arguments(
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=30,
        save_strategy="no",
    )
    evaluator = ReconstructionEvaluator([text[:20] for text in CORPUS])
    before = evaluator(model)["chrf"]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [text[:20] for text in CORPUS]}),
        loss=GemLoss(model, alpha=0.0, plain_ratio=0.0, tasks=["reconstruction"]),
        evaluator=evaluator,
    )
    trainer.train()
    watched = [entry["eval_chrf"] for entry in trainer.state.log_history if "eval_chrf" in entry]
    assert len(watched) == 2
    assert watched[-1] > before + 5
