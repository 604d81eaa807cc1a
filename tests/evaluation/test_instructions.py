"""Instructions for MTEB: all tasks have one, checkpoints carry them, and they reach the GEM tokens."""

from __future__ import annotations

import warnings

import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_st.instructions import INSTRUCTIONS, TYPE_INSTRUCTIONS, task_prompts

from ..conftest import CORPUS

PAPER_TASKS = [
    *("ArguAna", "ClimateFEVER", "NFCorpus", "SciFact", "StackOverflowDupQuestions", "SciDocsRR"),
    *("BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions"),
    *("Banking77Classification", "EmotionClassification", "MassiveIntentClassification"),
    *("STS17", "SICK-R", "STSBenchmark"),
]
ASYMMETRIC = ("Retrieval", "Reranking")


def metadata_of(benchmark: str) -> list:
    """Metadata of all tasks that are evaluated, which for CQADupstack are its parts."""
    mteb = pytest.importorskip("mteb")
    tasks = mteb.get_benchmark(benchmark).tasks
    return [part.metadata for task in tasks for part in getattr(task, "tasks", [task])]


@pytest.mark.parametrize(("benchmark", "num_tasks"), [("MTEB(eng, v1)", 67), ("MTEB(eng, v2)", 41)])
def test_mteb_finds_an_instruction_of_its_own_for_every_text_but_documents(benchmark, num_tasks):
    tasks = metadata_of(benchmark)
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    prompts = task_prompts()
    assert len(tasks) == num_tasks
    for task in tasks:
        is_asymmetric = task.type in ASYMMETRIC
        name = get_prompt_name(prompts, task, PromptType.query if is_asymmetric else None)
        assert name == (f"{task.name}-query" if is_asymmetric else task.name)
        assert name in INSTRUCTIONS
        assert not is_asymmetric or get_prompt_name(prompts, task, PromptType.document) is None
    names = {task.name for task in tasks}
    assert set(PAPER_TASKS) <= names or benchmark != "MTEB(eng, v1)"


def test_tasks_without_an_instruction_take_that_of_their_type():
    """Also local ones: mteb asks by the type of a task if there is nothing by its name."""
    for benchmark in ("MTEB(eng, v1)", "MTEB(eng, v2)"):
        types = {f"{task.type}-query" if task.type in ASYMMETRIC else task.type for task in metadata_of(benchmark)}
        assert types == set(TYPE_INSTRUCTIONS)


def test_mteb_knows_every_name():
    pytest.importorskip("mteb")
    from mteb.models.abs_encoder import AbsEncoder

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept, problems = AbsEncoder.validate_task_to_prompt_name(task_prompts(), raise_for_invalid_keys=False)
    assert kept == task_prompts()
    assert problems == ()


def test_the_instructions_are_those_that_mteb_has_for_most_tasks():
    """mteb took them from the same source; where it has none, or another spelling, is listed here."""
    others = {"AmazonCounterfactualClassification"}  # of LLM2Vec's spelling
    checked = 0
    for task in metadata_of("MTEB(eng, v1)"):
        text = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
        if text and task.name not in others:
            own = INSTRUCTIONS.get(task.name) or INSTRUCTIONS[f"{task.name}-query"]
            assert own == text.rstrip(".:")
            checked += 1
    assert checked > 40


def test_a_prompt_is_the_instruction_a_colon_and_the_text():
    prompts = task_prompts()
    assert prompts["Banking77Classification"] == "Given a online banking query, find the corresponding intents: "
    assert prompts["SciFact-query"].startswith("Given a scientific claim, retrieve documents that support or refute")
    assert not {"SciFact", "SciFact-document", "query", "document"} & set(prompts)
    assert not any(text.endswith((".", ":", " ")) for text in (*INSTRUCTIONS.values(), *TYPE_INSTRUCTIONS.values()))


def test_format_and_own_instructions():
    prompts = task_prompts("Instruct: {instruction}\nQuery: ", own={"STS12": "Compare {these}", "Mine-query": "Find"})
    assert prompts["STS13"] == "Instruct: Retrieve semantically similar text\nQuery: "
    assert prompts["STS12"] == "Instruct: Compare {these}\nQuery: "
    assert prompts["Mine-query"] == "Instruct: Find\nQuery: "
    with pytest.raises(ValueError, match=r"must hold \{instruction\}, as in .* got 'query: '"):
        task_prompts("query: ")


@pytest.mark.parametrize("freeze_base", [False, True])
def test_a_checkpoint_carries_them(make_model, tmp_path, freeze_base):
    model = make_model(num_gem_tokens=2, freeze_base=freeze_base)
    plain = model.encode(CORPUS)
    model.prompts.update(task_prompts())
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert again.prompts == {"query": "", "document": "", **task_prompts()}
    torch.testing.assert_close(again.encode(CORPUS), plain)  # unasked, none is used
    torch.testing.assert_close(again.encode_query(CORPUS), plain)
    told = again.encode(CORPUS, prompt_name="Banking77Classification")
    prompt = task_prompts()["Banking77Classification"]
    torch.testing.assert_close(told, model.encode([prompt + text for text in CORPUS]))
    assert abs(told - plain).max() > 0.01
    with pytest.raises(ValueError, match="Prompt name 'Banking78' not found"):
        again.encode(CORPUS, prompt_name="Banking78")
