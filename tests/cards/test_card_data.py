"""Cards are rendered, compared with what is true of the model, and every code block in them runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData, SentenceTransformerTrainer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st import AlphaSchedule, GemLoss, GemModelCardData, GemTransformer, gem_attention_mask, hub
from gem_st.cards.card_data import CITATION, MODEL_ID, draw_mask
from gem_st.evaluation import PerplexityEvaluator
from gem_st.modeling.gem_mask import gem_segments

from ..conftest import CORPUS, ROOT, quiet_arguments
from ..hub.hub_server import HubServer


def evaluators() -> list:
    similarity = EmbeddingSimilarityEvaluator(
        CORPUS[:4], CORPUS[4:], [0.1, 0.8, 0.4, 0.6], name="dev", main_similarity="cosine"
    )
    return [similarity, PerplexityEvaluator(CORPUS, name="village")]


def train(model: SentenceTransformer, folder: Path, **loss) -> list[dict]:
    """Train a little, with evaluations before and after; the metrics before."""
    loss, measures = GemLoss(model, **loss), evaluators()
    before = [evaluator(model) for evaluator in measures]
    arguments = quiet_arguments(
        folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3, logging_steps=1
    )
    data = Dataset.from_dict({"sentence": CORPUS})
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    for evaluator in measures:
        evaluator(model)
    return before


def test_a_card_tells_what_was_done(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    before = train(model, tmp_path / "run", alpha=AlphaSchedule(num_ntp_steps=1, final=0.6), plain_ratio=0.5)
    model.save_pretrained(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (tmp_path / "run" / "checkpoint-3" / "README.md").exists()
    for expected in (
        "| mode | full |",
        f"| GEM tokens (K) | 2, ids {model[0].gem_token_ids} (new rows of the embedding) |",
        "| pooling | mean over the GEM tokens |",
        f"SHA-256 `{model[0].settings()['remote_code_sha256']}`",
        "8 rows, columns sentence; loss `GemLoss`",
        '"plain_ratio": 0.5',
        "AlphaSchedule(num_ntp_steps=1, final=0.6",
        "- `learning_rate`: 0.01",
        f"torch {torch.__version__}",
        "CPU" if not torch.cuda.is_available() else "x ",
        "the generator moved",
        CITATION.strip(),
        "@inproceedings{reimers-2019-sentence-bert",
        draw_mask(2)[1],
    ):
        assert expected in card.text, expected
    after = model.model_card_data.eval_results_dict
    for metrics, (evaluator, result) in zip(before, after.items(), strict=True):
        name = evaluator.primary_metric
        assert f"| {name} | {metrics[name]:.4g} | {result[name]:.4g} |" in card.text
    assert before[1]["village_perplexity"] != pytest.approx(result["village_perplexity"], rel=1e-3)


def test_the_metadata_is_what_the_hub_reads(make_model, tmp_path):
    model = make_model(freeze_base=True, lora_rank=4)
    model[0].base_model_name_or_path, model[0].base_model_revision = "org/base", "abc123"
    train(model, tmp_path / "run")
    model.model_card_data.license = "llama3.2"
    model.save_pretrained(str(tmp_path / "model"))
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert {"sentence-transformers", "gem", "custom_code", "feature-extraction"} <= set(data.tags)
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "adapter", "llama3.2")
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"pearson_cosine", "spearman_cosine", "perplexity"}
    assert isinstance(results["perplexity"], EvalResult)
    _, village = model.model_card_data.eval_results_dict.values()
    assert results["perplexity"].metric_value == pytest.approx(village["village_perplexity"])
    text = (tmp_path / "model" / "README.md").read_text()
    assert "[org/base](https://huggingface.co/org/base), revision `abc123`" in text
    assert "**untouched**" in text
    assert "inherited from" not in text


def test_the_licence_is_that_of_the_base(make_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    model = SentenceTransformer(
        modules=[GemTransformer(str(base))], device="cpu", model_card_data=GemModelCardData(model_name="Mine")
    )
    model.save_pretrained(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "`apache-2.0`, inherited from the base model" in card.text
    assert "# Mine" in card.text
    assert str(tmp_path) not in card.text
    assert "Not evaluated yet." in card.text


@pytest.mark.parametrize("freeze_base", [True, False])
def test_the_data_type_stands_in_the_snippet_where_it_is_not_the_default(make_base, tmp_path, freeze_base):
    AutoModelForCausalLM.from_pretrained(make_base(), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(make_base()).save_pretrained(tmp_path / "base")
    gem = GemTransformer(str(tmp_path / "base"), freeze_base=freeze_base, model_kwargs={"dtype": "float32"})
    model = SentenceTransformer(modules=[gem], device="cpu", model_card_data=GemModelCardData())
    model.save_pretrained(str(tmp_path / "model"))
    text = (tmp_path / "model" / "README.md").read_text()
    assert ('trust_remote_code=True, model_kwargs={"dtype": "float32"})' in text) == freeze_base
    again = SentenceTransformer(
        str(tmp_path / "model"),
        trust_remote_code=True,
        device="cpu",
        **({"model_kwargs": {"dtype": "float32"}} if freeze_base else {}),
    )
    assert torch.equal(again.encode("rain", convert_to_tensor=True), model.encode("rain", convert_to_tensor=True))


def test_what_another_model_scores_stands_beside(make_model, tmp_path):
    model = make_model()
    GemLoss(model)
    evaluator = evaluators()[0]
    evaluator(model)
    assert model.model_card_data.compare() == []  # evaluated once, and not trained
    model.model_card_data.base_label = "base, mean pooling"
    model.model_card_data.set_base_metrics(evaluator, {"dev_spearman_cosine": 0.125})
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| | base, mean pooling | this model |" in text
    assert "| dev_spearman_cosine | 0.125 | " in text


def test_a_card_of_the_owners_choice_is_kept(make_base):
    class OwnCard(SentenceTransformerModelCardData):
        pass

    model = SentenceTransformer(modules=[GemTransformer(str(make_base()))], device="cpu", model_card_data=OwnCard())
    GemLoss(model)
    assert type(model.model_card_data) is OwnCard


def test_settings_of_a_stock_card_are_kept(make_base):
    card = SentenceTransformerModelCardData(license="mit", language="de", tags=["mine"])
    model = SentenceTransformer(modules=[GemTransformer(str(make_base()))], device="cpu", model_card_data=card)
    GemLoss(model)
    new = model.model_card_data
    assert isinstance(new, GemModelCardData)
    assert (new.license, new.language, new.model) == ("mit", ["de"], model)
    assert {"mine", "gem"} <= set(new.tags)


def test_a_card_by_another_loss_is_written_anew_on_export(make_model, tmp_path):
    model = make_model()
    arguments = quiet_arguments(tmp_path / "run", max_steps=2, learning_rate=0.0123)
    data = Dataset.from_dict({"anchor": CORPUS[:4], "positive": CORPUS[4:]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    model.save_pretrained(str(tmp_path / "model"))
    assert "trust_remote_code" not in (tmp_path / "model" / "README.md").read_text()
    loaded = hub.load(tmp_path / "model")
    card = ModelCard.load(hub.export(loaded, tmp_path / "export") / "README.md")
    assert "trust_remote_code=True" in card.text
    assert {"gem", "loss:MultipleNegativesRankingLoss"} <= set(card.data.tags)
    assert "`learning_rate`: 0.0123" in card.text
    assert "MultipleNegativesRankingLoss" in card.text
    assert headings(card.text)[:3] == ["## Use", "## Evaluation", "## Training Details"]


def test_a_card_that_is_still_true_is_kept_and_one_that_is_not_gives_what_it_knows(make_base, tmp_path):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[GemTransformer(str(make_base()))], device="cpu")
    GemLoss(model)
    model.model_card_data.base_model = "org/base"
    train(model, tmp_path / "run")
    model.save_pretrained(str(tmp_path / "model"))
    path = tmp_path / "model" / "README.md"
    path.write_text(path.read_text().replace("## Limits", "Words of its owner.\n\n## Limits"))
    loaded = hub.load(tmp_path / "model")
    assert (hub.export(loaded, tmp_path / "same") / "README.md").read_text() == path.read_text()
    old = ModelCard.load(path)
    stock = ModelCard.load(hub.export(loaded, tmp_path / "stock", format="stock") / "README.md")
    assert "| remote code | none |" in stock.text
    assert "| pooling | last token" in stock.text
    assert "trust_remote_code" not in stock.text
    assert "custom_code" not in stock.data.tags
    assert stock.data.base_model == "org/base"
    assert "[org/base](https://huggingface.co/org/base)" in stock.text
    for section in ("Evaluation", "Training"):
        pattern = rf"^## {section}\n.*?(?=^## )"
        texts = [re.search(pattern, card.text, flags=re.DOTALL | re.MULTILINE).group() for card in (old, stock)]
        assert texts[0] == texts[1]
    assert "village_perplexity" in stock.text
    assert stock.data.eval_results == old.data.eval_results


@pytest.mark.parametrize("num_gem_tokens", [1, 2, 4])
def test_the_mask_drawn_is_the_mask_used(make_base, num_gem_tokens):
    letters, drawing = draw_mask(num_gem_tokens)
    assert len(letters.split()) == num_gem_tokens
    config = GemTransformer(str(make_base())).model.config
    ids = torch.tensor([[0, 0, *range(1, num_gem_tokens + 1), 0, 0]])
    real = torch.ones_like(ids)
    segments = gem_segments(ids, real, list(range(1, num_gem_tokens + 1)))
    mask = gem_attention_mask(config, segments, real, torch.float32)[0, 0].bool()
    rows = [line.split()[1:] for line in drawing.splitlines()[1:]]
    assert torch.equal(torch.tensor([[mark == "x" for mark in row] for row in rows]), mask)


@pytest.mark.parametrize("kind", ["full", "frozen", "adapter_only", "concat"])
def test_every_code_block_of_a_card_runs(make_base, tmp_path, kind, run_without_gem_st):
    arguments = {
        "full": {},
        "frozen": {"freeze_base": True, "num_gem_tokens": 3},
        "adapter_only": {"freeze_base": True},
        "concat": {"num_gem_tokens": 2, "pooling": "concat"},
    }[kind]
    gem = GemTransformer(str(make_base()), **arguments)
    gem.save_base = kind != "adapter_only"
    model = SentenceTransformer(
        modules=[gem, Normalize()], device="cpu", model_card_data=GemModelCardData(), prompts={"query": "find: "}
    )
    folder = tmp_path / "model"
    model.model_card_data.set_model_id(str(folder))
    model.save_pretrained(str(folder))
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == (3 if kind == "adapter_only" else 4)
    assert '`query`: "find: "' in text
    output = run_without_gem_st("\n".join(blocks))
    width = 64 if kind == "concat" else 32
    assert f"(2, {width})" in output
    assert f"# (2, {width})" in text


# ---- the cards in model_cards


def render_module():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = render_module().render_recipes()
DEMO_CARDS = [f"gem-base-8m-{mode}.md" for mode in ("full", "frozen")]


def test_the_recipe_cards_are_what_the_template_gives():
    assert len(RECIPES) == 6
    for name, text in RECIPES.items():
        assert (ROOT / "model_cards" / name).read_text(encoding="utf-8") == text, "run model_cards/render.py"
    found = {path.name for path in (ROOT / "model_cards").glob("gem-*.md")}
    assert found == {*RECIPES, *DEMO_CARDS}


@pytest.mark.parametrize("name", [*RECIPES, *DEMO_CARDS])
def test_the_metadata_of_each_card_is_valid(name):
    card = ModelCard.load(ROOT / "model_cards" / name)
    assert card.data.license
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert {"gem", "custom_code"} <= set(card.data.tags)
    if name in RECIPES:
        assert card.data.base_model.count("/") == 1
        assert not card.data.eval_results  # nothing was run
        assert "not yet run" in card.text.lower()
    else:
        assert len(card.data.eval_results) > 10


def test_the_cards_of_the_small_demo_say_what_the_page_of_its_base_says():
    readme = (ROOT / "examples/base-8m/README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (similarity|retrieval|perplexity)[^|]*\|(.*)$", readme, flags=re.MULTILINE))
    columns = {"full": 1, "frozen": 2}
    for mode, column in columns.items():
        text = (ROOT / "model_cards" / f"gem-base-8m-{mode}.md").read_text(encoding="utf-8")
        for row, metric in (("similarity", "spearman_cosine"), ("retrieval", "ndcg@10"), ("perplexity", "perplexity")):
            numbers = [float(re.search(r"[\d.]+", cell).group()) for cell in rows[row].split("|")[:3]]
            before, after = re.search(rf"\| \S*{metric} \| (\S+) \| (\S+) \|", text).groups()
            assert [float(before), float(after)] == pytest.approx([numbers[0], numbers[column]], abs=6e-4, rel=1e-3)


def headings(text: str) -> list[str]:
    return re.findall(r"^## .*", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", DEMO_CARDS)
def test_the_cards_of_the_demo_are_of_this_template(name, make_model, tmp_path):
    model = make_model(num_gem_tokens=4, freeze_base="frozen" in name)
    train(model, tmp_path / "run")
    model.save_pretrained(str(tmp_path / "model"))
    fresh = (tmp_path / "model" / "README.md").read_text()
    text = (ROOT / "model_cards" / name).read_text(encoding="utf-8")
    assert headings(text) == headings(fresh)
    text = text.replace(', model_kwargs={"dtype": "float32"}', "")  # its base is in bfloat16, that of the test is not
    for pattern in (r"```python\n.*?```", r"```text\n.*?```"):
        blocks = re.findall(pattern, text, flags=re.DOTALL)
        renamed = [block.replace("your-name/" + name[:-3], MODEL_ID).replace("256)", "32)") for block in blocks]
        assert renamed == re.findall(pattern, fresh, flags=re.DOTALL)


@pytest.mark.slow
def test_every_code_block_of_a_recipe_runs(make_base, python, tmp_path):
    """The blocks of all recipe cards come from one template; here they run on a small base and a server of our own."""
    name = "gem-qwen3-0.6b"
    text = RECIPES[f"{name}.md"].replace("Qwen/Qwen3-0.6B-Base", str(make_base("qwen3"))).replace(", bf16=True", "")
    text = text.replace("max_steps=1000", "max_steps=2").replace("max_seq_length=512", "max_seq_length=128")
    scripts, bash = (re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) for kind in ("python", "bash"))
    (tmp_path / "wiki.txt").write_text("\n".join(CORPUS))
    (tmp_path / "blocks.py").write_text("\n".join(scripts))
    (tmp_path / "blocks.sh").write_text("\n".join(bash))
    with HubServer({"hf_writer": ("your-name", "write")}) as server:
        env = server.env(tmp_path / "home", token="hf_writer")
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        done = python.run("blocks.py", env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        command = ["bash", "-e", "blocks.sh"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "gem_reference.json" in server.files("your-name/Qwen3-0.6B-GEM")
    assert (tmp_path / f"{name}-adapter" / "gem_adapter").exists()
