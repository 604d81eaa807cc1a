"""The comparison of a generator with its base, against values computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st.evaluation import perplexity
from gem_st.evaluation.retention import Retention, compare_generators, compare_results

from ..conftest import CORPUS


class TableModel(nn.Module):
    """A language model whose logits depend on the last token only, by a table. Shape: ``(V, V)``"""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(table[0]))
        self.table = torch.tensor(table)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": self.table[input_ids]})


class DigitTokenizer:
    """Text of digits to ids; three tokens."""

    def __call__(self, texts: list[str], max_length: int, **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(letter) for letter in text][:max_length] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"0": 0, "1": 1, "2": 2}


LOG = math.log
BASE = [[LOG(0.5), LOG(0.3), LOG(0.2)], [LOG(0.2), LOG(0.2), LOG(0.6)], [0.0, 0.0, 0.0]]
CHANGED = [[LOG(0.3), LOG(0.5), LOG(0.2)], [LOG(0.25), LOG(0.25), LOG(0.5)], [0.0, 0.0, 0.0]]


def test_values_of_two_tables_are_those_computed_by_hand():
    """'0121' predicts 1 after 0, 2 after 1, 1 after 2; '01' predicts 1 after 0; '2' predicts nothing."""
    report = compare_generators(TableModel(CHANGED), TableModel(BASE), DigitTokenizer(), ["0121", "01", "2"])
    after_0 = 0.5 * LOG(0.5 / 0.3) + 0.3 * LOG(0.3 / 0.5)
    after_1 = 0.4 * LOG(0.2 / 0.25) + 0.6 * LOG(0.6 / 0.5)
    assert (report.num_texts, report.num_tokens, report.identical) == (2, 4, False)
    assert report.kl == pytest.approx((2 * after_0 + after_1) / 4, abs=1e-7)
    assert report.disagreement == 0.5  # after 0 one picks 0 and the other 1
    assert report.max_logit_difference == pytest.approx(LOG(0.5 / 0.3), abs=1e-6)
    assert report.perplexity == pytest.approx((0.5 * 0.5 * (1 / 3) * 0.5) ** -0.25, rel=1e-6)
    assert report.base_perplexity == pytest.approx((0.3 * 0.6 * (1 / 3) * 0.3) ** -0.25, rel=1e-6)
    assert report.perplexity_ratio == pytest.approx(report.perplexity / report.base_perplexity)
    assert report.ratio_low <= report.perplexity_ratio <= report.ratio_high
    assert report.sentence.startswith("The generator changed: it picks another token at 50 % of positions")


def test_rows_that_no_text_can_have_do_not_count():
    """A row appended for a GEM token, and one that the generator never writes, take no probability."""
    grown = TableModel([[*row, 9.0] for row in BASE])
    report = compare_generators(grown, TableModel(BASE), DigitTokenizer(), ["0121"])
    assert (report.identical, report.kl, report.disagreement) == (True, 0.0, 0.0)
    louder = TableModel([[row[0], row[1], row[2] + 5] for row in BASE])
    louder.generation_config = type("Config", (), {"suppress_tokens": [2]})
    report = compare_generators(louder, TableModel(BASE), DigitTokenizer(), ["0101"])
    assert report.identical
    assert report.base_perplexity == pytest.approx((0.3 / 0.8 * 0.5 * 0.3 / 0.8) ** (-1 / 3), rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_a_frozen_generator_is_the_bases_to_the_bit(make_model, make_base, architecture):
    model = make_model(architecture, freeze_base=True, lora_rank=4).train()
    base = AutoModelForCausalLM.from_pretrained(make_base(architecture)).train()
    report = compare_generators(model[0].model, base, model[0].tokenizer, CORPUS, batch_size=3)
    assert (report.identical, report.kl, report.disagreement, report.max_logit_difference) == (True, 0.0, 0.0, 0.0)
    assert (report.perplexity_ratio, report.ratio_low, report.ratio_high) == (1.0, 1.0, 1.0)
    assert report.base_perplexity == pytest.approx(perplexity(base, model[0].tokenizer, CORPUS), rel=1e-5)
    assert report.sentence.startswith("The generator is the base's, to the bit: all logits at")
    assert base.training
    assert not model[0].model.training  # a frozen base never is


def test_a_generator_that_was_trained_is_found_out(make_model, make_base):
    """A LoRA on every token in full mode, and the row of its own that the GEM model has appended."""
    model = make_model()
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    base = AutoModelForCausalLM.from_pretrained(make_base())
    assert model[0].model.get_input_embeddings().weight.shape[0] == base.config.vocab_size + 1
    report = compare_generators(model[0].model, base, model[0].tokenizer, CORPUS)
    assert not report.identical
    assert report.kl > 1e-5
    logits = [each.eval()(torch.tensor([[5, 6, 7]])).logits[..., :300] for each in (model[0].model, base)]
    assert not torch.equal(*logits)


def test_one_digit_of_rounding_is_not_called_a_change(make_base):
    base = AutoModelForCausalLM.from_pretrained(make_base())
    model = AutoModelForCausalLM.from_pretrained(make_base()).double()
    report = compare_generators(model, base, AutoTokenizer.from_pretrained(make_base()), CORPUS)
    assert not report.identical
    assert report.sentence.startswith("The generator is the base's but for rounding: logits differ by")
    assert f"the same token at all {report.num_tokens} positions" in report.sentence


def test_texts_without_two_tokens_are_refused():
    with pytest.raises(ValueError, match="one text of two tokens"):
        compare_generators(TableModel(BASE), TableModel(BASE), DigitTokenizer(), ["0", ""])


# --------------------------------------------------------------------------------------------------------------------
# Answers


def mmlu_result(**correct: str) -> dict[str, object]:
    means = [np.mean([int(answer) for answer in answers]) for answers in correct.values()]
    return {
        "main_score": float(np.mean(means)),
        "type": "mmlu",
        "metric": "acc",
        "higher_is_better": True,
        "num_samples": sum(map(len, correct.values())),
        "subjects": {},
        "correct": correct,
    }


def test_differences_are_over_subjects_and_their_intervals_those_of_an_explicit_bootstrap():
    base = mmlu_result(history="1110000000", law="1100")
    changed = mmlu_result(history="1101111000", law="1000")
    task = compare_results(changed, base, num_resamples=20000)
    assert task.difference == pytest.approx((0.3 - 0.25) / 2)
    assert task.subjects["history"].difference == pytest.approx(0.3)
    assert task.subjects["law"].difference == pytest.approx(-0.25)
    random = np.random.default_rng(1)
    history = np.array([0, 0, -1, 1, 1, 1, 1, 0, 0, 0])
    law = np.array([0, -1, 0, 0])
    drawn = (random.choice(history, (20000, 10)).mean(axis=1) + random.choice(law, (20000, 4)).mean(axis=1)) / 2
    assert [task.low, task.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert task.low < task.difference < task.high
    assert task.verdict == "within noise"


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Two models that are right 60 % and 50 % of the time, on 200 questions, 200 times."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        records = ["".join(map(str, (random.random(200) < share).astype(int))) for share in (0.6, 0.5)]
        task = compare_results(mmlu_result(all=records[0]), mmlu_result(all=records[1]), random=random)
        hits += task.low <= 0.1 <= task.high
    assert 180 <= hits <= 199


def report_of(identical: bool = False, disagreement: float = 0.032, kl: float = 0.1, **tasks: object) -> Retention:
    return Retention(identical, 10, 1234, disagreement, kl, 2e-6, 10.7, 10.0, 1.07, 1.05, 1.09, tasks)


def test_the_sentence_says_which_case_it_is():
    base = mmlu_result(all="1" * 50 + "0" * 50)
    worse = compare_results(mmlu_result(all="1" * 30 + "0" * 70), base)
    better = compare_results(mmlu_result(all="1" * 70 + "0" * 30), base)
    noise = compare_results(mmlu_result(all="0" + "1" * 49 + "0" * 50), base)
    same = compare_results(base, base)
    assert report_of(True, 0, 0, MMLU=same).sentence == (
        "The generator is the base's, to the bit: all logits at 1,234 tokens of text are equal, and so are its "
        "scores in MMLU."
    )
    assert "they were not measured in the same way" in report_of(True, 0, 0, MMLU=worse).sentence
    start = "The generator changed: it picks another token at 3.2 % of positions, perplexity x 1.07 (95 % CI 1.05 to "
    assert report_of(MMLU=noise).sentence.startswith(f"{start}1.09), MMLU -1.0 points (95 % CI -3.0 to 0.0, within ")
    assert "MMLU -20.0 points (95 % CI " in report_of(MMLU=worse).sentence
    assert report_of(MMLU=worse).sentence.endswith(", a loss).")
    assert report_of(MMLU=better).sentence.endswith(", a gain).")
    assert report_of(MMLU=same).sentence.endswith(", MMLU 0.0 points (equal).")


def test_a_report_can_be_written_and_scores_without_answers_are_compared_too(make_base):
    base = AutoModelForCausalLM.from_pretrained(make_base())
    books = {"main_score": 9.0, "type": "perplexity", "metric": "perplexity", "higher_is_better": False}
    results = {"books": {**books, "num_samples": 4}, "MMLU": mmlu_result(law="10"), "only here": mmlu_result(law="1")}
    base_results = {"books": {**books, "main_score": 8.0, "num_samples": 4}, "MMLU": mmlu_result(law="11")}
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    report = compare_generators(base, base, tokenizer, CORPUS[:2], results=results, base_results=base_results)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["tasks"].keys() == {"books", "MMLU"}
    assert values["tasks"]["books"]["difference"] == 1.0
    assert values["tasks"]["books"]["low"] is None
    assert values["tasks"]["MMLU"]["difference"] == -0.5
    assert values["sentence"] == report.sentence
    assert "books perplexity 8 to 9" in report.sentence


def test_results_of_other_questions_are_refused():
    base = mmlu_result(law="1100", history="10")
    with pytest.raises(ValueError, match="MMLU: num_samples is 3 for the model and 6 for its base"):
        compare_results(mmlu_result(law="110"), base, name="MMLU")
    with pytest.raises(ValueError, match="not of the same questions"):
        compare_results(mmlu_result(law="110", history="100"), base)
