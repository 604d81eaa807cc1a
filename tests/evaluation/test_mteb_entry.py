"""mteb on local tasks: the model in memory, from a folder, through an entry and through mteb's command line agree."""

from __future__ import annotations

import importlib
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from gem_st.evaluation.mteb_entry import RECIPES, main, model_meta, register
from gem_st.instructions import task_prompts

from ..conftest import CORPUS, ROOT

mteb = pytest.importorskip("mteb")
from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import SentenceTransformerEncoderWrapper  # noqa: E402
from mteb.models.model_implementations import MODEL_REGISTRY  # noqa: E402

RANDOM = random.Random(0)
WORDS = sorted({word for text in CORPUS for word in text.split()})
TEXTS = [" ".join(RANDOM.sample(WORDS, 6)) for _ in range(40)]


def describe(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="Made up.",
        dataset={"path": "local", "revision": "1"},
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        reference=None,
        modalities=["text"],
    )


class LocalSTS(AbsTaskSTS):
    metadata = describe("LocalSTS", "STS", "cosine_spearman")

    def load_data(self, **kwargs):
        pairs = {"sentence1": TEXTS[:20], "sentence2": TEXTS[20:], "score": [float(i * 7 % 20) / 4 for i in range(20)]}
        self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(pairs)), True


class LocalClassification(AbsTaskClassification):
    metadata = describe("LocalClassification", "Classification", "accuracy")
    samples_per_label, n_experiments = 4, 2

    def load_data(self, **kwargs):
        rows = {"text": TEXTS[:20], "label": [i % 3 for i in range(20)]}
        other = {"text": TEXTS[20:], "label": [len(text) % 3 for text in TEXTS[20:]]}
        self.dataset = DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(other))
        self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):
    metadata = describe("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, **kwargs):
        ids = [str(i) for i in range(20)]
        part = {
            "corpus": Dataset.from_dict({"id": ids, "text": TEXTS[:20], "title": [""] * 20}),
            "queries": Dataset.from_dict({"id": ids, "text": [text[:12] for text in TEXTS[:20]]}),
            "relevant_docs": {i: {i: 1} for i in ids},
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": part}}, True


TASKS = (LocalSTS, LocalClassification, LocalRetrieval)
NAMES = [task.metadata.name for task in TASKS]


def scores(model) -> dict[str, float]:
    result = mteb.evaluate(model, [task() for task in TASKS], cache=None, show_progress_bar=False)
    return {part.task_name: part.get_score() for part in result.task_results}


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    model = make_model(num_gem_tokens=2, freeze_base=True)
    model.prompts.update(task_prompts())
    model.save_pretrained(str(tmp_path / "gem"))
    return tmp_path / "gem"


def test_all_ways_through_mteb_give_the_same_scores(checkpoint, tmp_path, monkeypatch):
    model = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    expected = scores(model)
    assert list(expected) == NAMES
    assert scores(model_meta(str(checkpoint))) == expected

    registry = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    for task in TASKS:
        monkeypatch.setitem(registry, task.metadata.name, task)
    monkeypatch.setattr(sys, "argv", sys.argv)
    main(["run", "-m", str(checkpoint), "-t", *NAMES, "--output-folder", str(tmp_path / "out"), "--no-co2-tracker"])
    assert scores(mteb.get_model(str(checkpoint))) == expected  # it is listed now
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("Local*.json")}
    written = {name: files[name]["scores"]["test"][0]["main_score"] for name in NAMES}
    assert written == {name: round(float(score), 6) for name, score in expected.items()}  # mteb rounds what it writes
    MODEL_REGISTRY.pop(str(checkpoint))

    model.prompts.clear()
    without = scores(model)
    assert all(without[name] != expected[name] for name in NAMES)


def test_documents_have_no_instruction_and_a_local_name_only_where_mteb_knows_it(checkpoint, monkeypatch):
    model = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    seen: list[tuple[str, str]] = []
    codec = type(model[0].base.text)
    real = codec.encode
    monkeypatch.setattr(
        codec,
        "encode",
        lambda self, texts, prompt="", *args, **kwargs: (
            seen.extend((text, prompt) for text in texts) or real(self, texts, prompt, *args, **kwargs)
        ),
    )
    mteb.evaluate(model, LocalRetrieval(), cache=None, show_progress_bar=False)
    prompt = task_prompts()["Retrieval-query"]
    assert {used for text, used in seen if text in TEXTS} == {""}
    assert {used for text, used in seen if text not in TEXTS} == {prompt}

    model.prompts.update(task_prompts(own={"LocalSTS": "Of my own"}))
    seen.clear()
    with pytest.warns(UserWarning, match="Task name LocalSTS is not valid"):
        mteb.evaluate(model, LocalSTS(), cache=None, show_progress_bar=False)
    assert {used for _, used in seen} == {task_prompts()["STS"]}
    seen.clear()
    monkeypatch.setitem(importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY, "LocalSTS", LocalSTS)
    mteb.evaluate(model, LocalSTS(), cache=None, show_progress_bar=False)
    assert {used for _, used in seen} == {"Of my own: "}


def test_a_result_of_another_model_in_the_same_folder_is_not_taken(checkpoint, make_model, tmp_path):
    """mteb looks results up by name and revision; models in memory have neither, and share what it stores."""
    cache = mteb.ResultCache(tmp_path / "cache")
    found = []
    for seed in (1, 2):
        meta = model_meta(str(checkpoint))
        result = mteb.evaluate(meta, LocalSTS(), cache=cache, show_progress_bar=False)
        found.append(result.task_results[0].get_score())
        again = mteb.evaluate(meta, LocalSTS(), cache=cache, show_progress_bar=False, overwrite_strategy="only-cache")
        assert again.task_results[0].get_score() == round(float(found[-1]), 6)
        make_model(num_gem_tokens=seed, vocab_size=600).save_pretrained(str(checkpoint))
    assert found[0] != found[1]


# ---- entries

CONFIGS = {
    "gem-llama-3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "gem-llama-3.2-3b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "gem-llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "gem-mistral-7b": MistralConfig(),  # its defaults are those of Mistral-7B-v0.1
    "gem-qwen3-0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "gem-qwen3-4b": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


def test_recipes_are_those_of_the_cards():
    cards = yaml.safe_load((ROOT / "model_cards" / "recipes.yaml").read_text())["recipes"]
    assert {card["name"]: card["base"] for card in cards} == {name: recipe.base for name, recipe in RECIPES.items()}
    for card in cards:
        meta = model_meta(f"your-name/{card['release_name']}", card["name"])
        billions, vocabulary, width = (
            part.replace(",", "")
            for part in card["size"]
            .replace(" vocabulary", "")
            .replace(" billion parameters;", "")
            .replace(" x", "")
            .split()
        )
        assert round(meta.n_parameters / 1e9, 2) == float(billions)
        assert meta.n_embedding_parameters == int(vocabulary) * int(width)
        assert meta.embed_dim == int(width)
        assert meta.license == card["license"] or card["license"].replace(".", "_") in meta.license


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_of_a_recipe_are_counted(recipe):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(CONFIGS[recipe])
    assert base.num_parameters() == RECIPES[recipe].num_parameters
    assert list(base.get_input_embeddings().weight.shape) == [RECIPES[recipe].vocab_size, RECIPES[recipe].width]


def test_an_entry_holds_the_facts(checkpoint, make_model):
    meta = model_meta("your-name/x", "gem-qwen3-0.6b", revision="abc", release_date="2026-01-01", contacts=["me"])
    assert meta.loader is SentenceTransformerEncoderWrapper
    assert meta.loader_kwargs == {"trust_remote_code": True}
    assert (meta.revision, meta.release_date, meta.contacts) == ("abc", "2026-01-01", ["me"])
    assert (meta.max_tokens, meta.adapted_from) == (512, "Qwen/Qwen3-0.6B-Base")
    assert meta.similarity_fn_name.value == "cosine"
    assert meta.memory_usage_mb == 2274  # 596,049,920 weights of 4 bytes
    assert meta.use_instructions is None  # not known before it was saved
    assert meta.training_datasets == set()  # no task of mteb: all of it is zero-shot
    assert meta.is_zero_shot_on(mteb.get_tasks(tasks=["STSBenchmark"]))
    assert "2506.04344" in meta.citation
    assert meta.public_training_code is None

    model = make_model(num_gem_tokens=2, freeze_base=True, pooling="concat")
    meta = model_meta("your-name/x", "gem-qwen3-0.6b", model=model)
    assert meta.embed_dim == 64
    assert meta.n_parameters == sum(weight.numel() for weight in model.parameters())
    assert meta.use_instructions is False
    model.prompts.update(task_prompts())
    assert model_meta("your-name/x", model=model).use_instructions is True

    local = model_meta(str(checkpoint))
    assert (local.name, local.reference) == (str(checkpoint), None)
    assert local.revision == model_meta(str(checkpoint)).revision
    assert model_meta(str(checkpoint), revision="abc").revision == "abc"
    model.save_pretrained(str(checkpoint))
    assert local.revision != model_meta(str(checkpoint)).revision


def test_a_registered_entry_is_found(monkeypatch):
    monkeypatch.delitem(MODEL_REGISTRY, "your-name/x", raising=False)
    meta = model_meta("your-name/x", "gem-qwen3-4b")
    register(meta)
    assert mteb.get_model_meta("your-name/x") == meta
    assert meta in mteb.get_model_metas(n_parameters_range=(4_000_000_000, 4_100_000_000))
    MODEL_REGISTRY.pop("your-name/x")


def test_bad_entries_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"There is no recipe 'gem-gpt', but gem-llama-3\.2-1b, "):
        model_meta("your-name/x", "gem-gpt")
    with pytest.raises(ValueError, match="organization/model_name"):
        model_meta("x")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        model_meta("your-name/x", num_gem_tokens=4)
    monkeypatch.setattr("gem_st.evaluation.suites.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need mteb: pip install"):
        model_meta("your-name/x")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # each is run once more, as if for the first time
@pytest.mark.parametrize("module", ["gem_st.__init__", "gem_st.instructions", "gem_st.evaluation.mteb_entry"])
def test_modules_are_imported_without_mteb(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert runpy.run_module(module)["__doc__"]
