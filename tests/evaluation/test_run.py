"""`gem-st eval` as a whole: files, resuming, the base beside the checkpoint, the card, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import gem_st.evaluation.run as evaluate_module
from gem_st import GemTransformer
from gem_st.cli import app
from gem_st.evaluation.baselines import build_baseline
from gem_st.evaluation.identity import same_weights
from gem_st.evaluation.mteb_scores import score_task
from gem_st.evaluation.render import insert_section, lost_groups, render_markdown, render_row, update_card
from gem_st.evaluation.results import EvalResults
from gem_st.evaluation.run import EvalConfig, evaluate, named_base
from gem_st.evaluation.suites import load_suite, read_texts_of

from ..conftest import CORPUS, ROOT
from ..gguf_files import write_gguf

pytestmark = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb needs Python 3.11")

SUITE = """
tasks:
  - {name: Graded, type: STS, data: sts.csv}
  - {name: Groups, type: Clustering, data: groups.csv}
knowledge:
  - {name: Trivia, type: arc_easy, data: trivia.jsonl}
  - {name: lines, type: perplexity, data: lines.txt}
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    pairs = zip(CORPUS, CORPUS[3:] + CORPUS[:3], strict=True)
    rows = [f'"{a}","{b}",{i * 3 % 7}' for i, (a, b) in enumerate(pairs)]
    (tmp_path / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    (tmp_path / "groups.csv").write_text("\n".join(["text,label", *(f'"{t}",{i % 2}' for i, t in enumerate(CORPUS))]))
    choices = {"choices": ["by the sea", "at noon", "no"], "labels": ["A", "B", "C"], "answer": "B"}
    (tmp_path / "trivia.jsonl").write_text("\n".join(json.dumps({"id": t, "question": t, **choices}) for t in CORPUS))
    lines = [f"{text} {other}" for text in CORPUS for other in CORPUS[:3]]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "suite.yaml").write_text(SUITE)
    return str(tmp_path / "suite.yaml")


@pytest.fixture
def make_checkpoint(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    def make(name: str = "checkpoint", **kwargs: Any) -> str:
        model = make_model(num_gem_tokens=2, **kwargs)
        if not kwargs.get("freeze_base"):
            for weight in model[0].model.parameters():
                weight.data.mul_(1.05)
        model.save_pretrained(str(tmp_path / name))
        return str(tmp_path / name)

    return make


def run(checkpoint: str, suite: str, base: Path | str, **kwargs: Any) -> tuple[EvalResults, dict[str, Any], list[str]]:
    lines: list[str] = []
    output = str(Path(suite).parent / "out")
    settings = {"baseline": str(base), "suite": suite, "output": output, "device": "cpu", **kwargs}
    config = EvalConfig(checkpoint, **settings)
    results = evaluate(config, progress=lines.append)
    return results, json.loads((Path(output) / "results.json").read_text()), lines


def test_a_frozen_base_loses_nothing(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "same_weights", lambda *_: False)  # so that both are asked
    results, saved, _ = run(make_checkpoint(freeze_base=True), suite, make_base())
    assert saved["embedding"].keys() == {"Graded", "Groups"}
    graded = saved["embedding"]["Graded"]
    assert graded["type"] == "STS"
    assert graded["metric"] == "cosine_spearman"
    assert graded["baseline"] == graded["baselines"]["mean"] != graded["main_score"]
    assert graded["difference"] == pytest.approx(graded["main_score"] - graded["baseline"])
    assert graded["baselines"].keys() == {"mean", "lasttoken", "echo"}
    for entry in saved["generation"].values():
        own = {key: value for key, value in entry.items() if key not in ("base", "baseline", "difference")}
        assert own == entry["base"]
        assert entry["difference"] == 0
    assert saved["retention"]["identical"] is True
    assert saved["retention"]["kl"] == 0
    assert "to the bit" in results.retention["sentence"]
    assert saved["config"]["mode"] == "frozen"
    assert {"mteb", "lm-eval", "torch"} <= saved["config"]["versions"].keys()


def test_scores_are_of_the_models_they_are_named_after(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str
) -> None:
    checkpoint = make_checkpoint()
    _, saved, _ = run(checkpoint, suite, make_base(), knowledge=[])
    task = load_suite(suite).tasks[0]
    model = SentenceTransformer(checkpoint, trust_remote_code=True, device="cpu")
    assert saved["embedding"]["Graded"]["main_score"] == score_task(model, task, name="a", revision="")["main_score"]
    for name, value in saved["embedding"]["Graded"]["baselines"].items():
        baseline = build_baseline(name, str(make_base()), max_seq_length=model.max_seq_length - 2)
        assert value == score_task(baseline, task, name="a", revision="")["main_score"]


def test_same_weights_are_not_asked_twice(
    make_checkpoint: Callable[..., str],
    make_base: Callable[..., Path],
    suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, ask = [], evaluate_module.evaluate_generation
    monkeypatch.setattr(
        evaluate_module, "evaluate_generation", lambda *a, **kw: asked.append(a[2].name) or ask(*a, **kw)
    )
    _, saved, lines = run(make_checkpoint(freeze_base=True), suite, make_base(), compare=["mean"])
    assert asked == ["Trivia", "lines"]
    assert saved["generation"]["Trivia"]["baseline"] == saved["generation"]["Trivia"]["main_score"]
    assert any("not asked for twice" in line for line in lines)


def test_a_full_model_is_compared_with_its_base(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str
) -> None:
    results, saved, _ = run(make_checkpoint(), suite, make_base(), compare=["mean"])
    entry = saved["generation"]["lines"]
    assert entry["main_score"] != entry["baseline"]
    assert saved["retention"]["kl"] > 0
    assert results.retention["sentence"].startswith("The generator changed")
    assert same_weights(*[AutoModelForCausalLM.from_pretrained(make_base()) for _ in range(2)])


def test_a_killed_run_goes_on(
    make_checkpoint: Callable[..., str],
    make_base: Callable[..., Path],
    suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = make_checkpoint()
    encode, calls = SentenceTransformer.encode, []

    def die_in_the_third(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # a score of two columns takes two
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "encode", die_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, suite, make_base(), compare=["mean"])
    saved = json.loads((Path(suite).parent / "out" / "results.json").read_text())
    assert saved["embedding"].keys() == {"Graded", "Groups"}
    _, whole, _ = run(checkpoint, suite, make_base(), compare=["mean"])
    assert whole["embedding"]["Graded"]["main_score"] == saved["embedding"]["Graded"]["main_score"]
    for path in (Path(suite).parent / "out" / "mteb").rglob("Graded.json"):
        path.write_text(path.read_text()[:40])  # killed while mteb wrote
    _, repaired, _ = run(checkpoint, suite, make_base(), compare=["mean"])
    assert repaired["embedding"]["Graded"]["main_score"] == whole["embedding"]["Graded"]["main_score"]
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: pytest.fail("was encoded again"))
    monkeypatch.setattr(evaluate_module, "evaluate_generation", lambda *_, **__: pytest.fail("was asked again"))
    _, again, _ = run(checkpoint, suite, make_base(), compare=["mean"])
    assert again["embedding"] == whole["embedding"]
    assert again["generation"] == whole["generation"]


def test_one_task_that_fails_loses_none(
    make_checkpoint: Callable[..., str],
    make_base: Callable[..., Path],
    suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = evaluate_module.score_task

    def fail(model: Any, task: Any, **kwargs: Any) -> Any:
        if task.metadata.name == "Graded":
            raise RuntimeError("broken on purpose")
        return score(model, task, **kwargs)

    monkeypatch.setattr(evaluate_module, "score_task", fail)
    checkpoint = make_checkpoint()
    results, saved, _ = run(checkpoint, suite, make_base(), compare=[])
    assert results.errors == saved["errors"] == {"Graded": "RuntimeError: broken on purpose"}
    assert "Graded failed: RuntimeError: broken on purpose" in render_row(results)
    assert saved["embedding"].keys() == {"Groups"}
    assert saved["generation"].keys() == {"Trivia", "lines"}
    assert "gem-st eval" not in (Path(checkpoint) / "README.md").read_text()


def test_without_network_a_task_of_the_hub_names_the_local_way(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.abstasks import AbsTask

    monkeypatch.setattr(AbsTask, "load_data", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(OSError, match=r"STSBenchmark is on the Hub, which cannot be reached\. Local files"):
        run(make_checkpoint(), "smoke", make_base(), output=str(Path(suite).parent / "out"))


def test_a_plain_model_is_evaluated_as_it_is_and_said_to_be(
    make_base: Callable[..., Path], suite: str, tmp_path: Path
) -> None:
    build_baseline("lasttoken", str(make_base())).save_pretrained(str(tmp_path / "plain"))
    _, saved, lines = run(str(tmp_path / "plain"), suite, "none")
    assert any("not a GEM checkpoint" in line and "Transformer, Pooling" in line for line in lines), lines
    assert any("no whole causal language model (no lm_head.weight)" in line for line in lines)
    assert saved["generation"] == {}
    assert saved["config"]["is_gem"] is False
    assert saved["embedding"]["Graded"]["baseline"] is None
    bare, _, lines = run(str(make_base()), suite, make_base(), compare=["lasttoken"], knowledge=["Trivia"])
    assert any("not a GEM checkpoint" in line for line in lines)
    assert bare.generation["Trivia"]["difference"] == 0


def test_which_base_is_meant(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, full = make_checkpoint("frozen", freeze_base=True), make_checkpoint("full")
    models = [SentenceTransformer(path, trust_remote_code=True) for path in (frozen, full)]
    assert named_base(models[0][0], EvalConfig(frozen)) == frozen  # its weights are the base's
    assert named_base(models[1][0], EvalConfig(full)) is None  # it is not its own base
    card = Path(full, "README.md")
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: org/base\n", 1))
    assert named_base(models[1][0], EvalConfig(full)) == "org/base"
    with pytest.raises(ValueError, match=r"'/nowhere/base', which is not on this machine\. Give it as --baseline"):
        run(full, suite, "/nowhere/base")
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: pytest.fail("was encoded before"))
    with pytest.raises(ValueError, match=r"The base '.*' cannot be read\. Give another as --baseline"):
        run(full, suite, Path(suite).parent)


def test_the_base_is_read_as_the_checkpoint_was(
    make_model: Callable[..., Any], make_base: Callable[..., Path], suite: str, tmp_path: Path
) -> None:
    rounded = str(make_base())
    base = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base16")
    AutoTokenizer.from_pretrained(rounded).save_pretrained(tmp_path / "base16")
    gem = GemTransformer(str(tmp_path / "base16"), model_kwargs={"dtype": torch.float32})
    prompts = {"about": "It is about this: "}
    model = SentenceTransformer(modules=[gem], prompts=prompts, default_prompt_name="about")
    model.save_pretrained(str(tmp_path / "full"))
    _, saved, _ = run(str(tmp_path / "full"), suite, tmp_path / "base16", compare=["mean"])
    assert saved["retention"]["identical"] is True
    task = load_suite(suite).tasks[0]
    baseline = build_baseline("mean", str(tmp_path / "base16"), model_kwargs={"dtype": torch.float32})
    plain = score_task(baseline, task, name="a", revision="")["main_score"]
    baseline.prompts, baseline.default_prompt_name = prompts, "about"
    score = score_task(baseline, task, name="a", revision="")["main_score"]
    assert saved["embedding"]["Graded"]["baseline"] == score != plain


def test_revisions_are_those_of_the_checkpoint_and_of_its_base(
    make_model: Callable[..., Any],
    make_base: Callable[..., Path],
    suite: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def note(pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        read.append((pretrained_model_name_or_path, kwargs.get("revision")))
        return load(pretrained_model_name_or_path, **kwargs)

    monkeypatch.setattr(evaluate_module.AutoModelForCausalLM, "from_pretrained", note)
    base = str(make_base())
    run(base, suite, base, compare=["mean"], knowledge=["Trivia"], revision="v2")
    assert read == [(base, "v2"), (base, None)]
    model = make_model(num_gem_tokens=2, freeze_base=True)
    model[0].save_base, model[0].base_model_revision = False, "abc"
    model.save_pretrained(str(tmp_path / "adapter"))
    read.clear()
    run(str(tmp_path / "adapter"), suite, model[0].base_model_name_or_path, compare=["mean"], knowledge=["Trivia"])
    assert read[-1] == (model[0].base_model_name_or_path, "abc")


def test_a_base_in_a_gguf_file_is_compared(make_model: Callable[..., Any], suite: str, tmp_path: Path) -> None:
    dense = make_model(num_reserved=2, hidden_size=64, intermediate_size=64, head_dim=16)
    base = str(write_gguf(dense[0], tmp_path / "base.gguf"))
    gem = GemTransformer(base, freeze_base=True, gem_tokens="reserved")
    SentenceTransformer(modules=[gem], device="cpu").save_pretrained(str(tmp_path / "adapter"))
    settings = {"suite": suite, "output": str(tmp_path / "out"), "device": "cpu", "compare": ["mean", "echo"]}
    results = evaluate(EvalConfig(str(tmp_path / "adapter"), **settings))
    assert results.embedding["Graded"]["baselines"].keys() == {"mean", "echo"}
    assert {entry["difference"] for entry in results.generation.values()} == {0}
    assert not results.errors


def test_a_base_that_is_not_named_is_no_reason_for_claims(make_checkpoint: Callable[..., str], suite: str) -> None:
    results, saved, lines = run(make_checkpoint(freeze_base=True), suite, "")
    assert saved["embedding"]["Graded"]["baselines"].keys() == {"mean", "lasttoken", "echo"}
    assert saved["retention"] is None
    assert saved["generation"]["Trivia"]["baseline"] is None
    assert any("names no base" in line and "--baseline" in line for line in lines)
    assert "to the bit" not in render_markdown(results)


def test_folders_that_end_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("a/full", "b/full"):
        (tmp_path / name).mkdir(parents=True)
    first, second = (EvalConfig(str(tmp_path / name)).folder for name in ("a/full", "b/full"))
    assert (first, second) == (Path("runs/eval/a--full"), Path("runs/eval/b--full"))
    assert EvalConfig("org/gem").folder == Path("runs/eval/org--gem")


def test_the_card_has_one_section(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str
) -> None:
    checkpoint = make_checkpoint()
    readme = Path(checkpoint) / "README.md"
    readme.write_text("---\nlicense: mit\n---\n# Mine\n\n## Evaluation\n\nNot evaluated yet.\n\n## Training\n\nNone.\n")
    for _ in range(2):
        results, _, _ = run(checkpoint, suite, make_base(), compare=["mean"], knowledge=[])
    card = ModelCard.load(readme)
    assert card.data.license == "mit"
    scores = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert scores == {task: round(100 * entry["main_score"], 4) for task, entry in results.embedding.items()}
    text = readme.read_text()
    assert text.count("gem-st eval: start") == text.count("## Evaluation") == 1
    assert "Not evaluated yet" not in text
    assert text.rstrip().endswith("## Training\n\nNone.")
    assert render_row(results).strip() in text
    assert str(Path(suite).parent) not in text, "a folder of this machine"
    assert f"suite suite.yaml, baseline {make_base().name}" in text


METRICS = """---
license: mit
model-index:
- name: mine
  results:
  - task: {type: semantic-similarity, name: Semantic Similarity}
    dataset: {name: dev, type: dev}
    metrics:
    - {type: pearson_cosine, value: 0.5}
    - {type: spearman_cosine, value: 0.6}
---
# Mine
"""


def test_metadata_of_others_is_kept_and_that_of_an_earlier_run_is_not(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(METRICS)
    for task in ("Old", "New"):
        results = EvalResults("mine")
        results.add_embedding(task, {"main_score": 0.25, "type": "STS", "metric": "m", "metrics": {}}, None)
        update_card(readme, results)
    card = ModelCard.load(readme)
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {("dev", "pearson_cosine"): 0.5, ("dev", "spearman_cosine"): 0.6, ("New", "m"): 25.0}
    readme.write_text("---\nlicense: [mit\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README.md cannot be read, so that the results are not in it: while parsing"):
        update_card(readme, results)


def test_health_is_in_the_results(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    results, saved, _ = run(checkpoint, suite, make_base(), compare=[], knowledge=["lines"], health=True)
    assert saved["health"]["num_texts"] >= 16
    assert "| Batches of 1 against batches of" in render_markdown(results)
    monkeypatch.setattr(evaluate_module, "measure_health", lambda *_, **__: pytest.fail("was examined again"))
    _, again, _ = run(checkpoint, suite, make_base(), compare=[], knowledge=["lines"], health=True)
    assert again["health"] == saved["health"]


def test_too_few_texts_for_health_cost_nothing_else(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str
) -> None:
    (Path(suite).parent / "lines.txt").write_text("\n".join(CORPUS[:3]))
    results, saved, _ = run(make_checkpoint(), suite, make_base(), compare=["mean"], health=True)
    assert results.errors["health"].startswith("ValueError: At least 16")
    assert saved["generation"].keys() == {"Trivia", "lines"}
    assert saved["retention"] is not None


def test_the_command(make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str) -> None:
    output = Path(suite).parent / "out"
    arguments = ["eval", make_checkpoint(), "--suite", suite, "--baseline", str(make_base()), "--compare", "mean"]
    arguments += ["--knowledge", "none", "--output", str(output), "--limit", "6", "--no-card"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| **checkpoint** |" in done.stdout
    assert {path.name for path in output.iterdir()} >= {"results.json", "results.md", "results.png", "mteb"}
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["eval", "nowhere", "--suite", "papers"])
    assert wrong.exit_code == 1
    assert "no suite 'papers'" in wrong.stderr


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"limit": 0}, "limit must be"), ({"batch_size": 0}, "batch_size must be"), ({"compare": ["max"]}, "'max'")],
)
def test_bad_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig("checkpoint", **kwargs)


def test_the_row_is_the_papers(make_base: Callable[..., Path]) -> None:
    results = EvalResults("gem")
    own = {("A", "Clustering"): 0.4, ("B", "Clustering"): 0.2, ("C", "STS"): 0.5, ("D", "Retrieval"): 0.1}
    mean = {"A": 0.1, "B": 0.1, "C": 0.6, "D": 0.1}
    for (task, kind), value in own.items():
        for score, name in ((value, None), (mean[task], "mean")):
            results.add_embedding(task, {"main_score": score, "type": kind, "metric": "m", "metrics": {}}, name)
    results.add_generation("MMLU", {"main_score": 0.25, "type": "mmlu", "metric": "acc"}, is_base=False)
    results.add_generation("MMLU", {"main_score": 0.5, "type": "mmlu", "metric": "acc"}, is_base=True)
    assert results.groups() == {"Clust": 30, "STS": 50, "Retr": 10, "Avg": 30}
    rows = render_row(results).splitlines()
    assert rows[0] == "|  | Clust | STS | Retr | Avg | MMLU |"
    assert rows[2] == "| mean pooling | 10.00 | 60.00 | 10.00 | 26.67 | 50.00 |"
    assert rows[3] == "| **gem** | 30.00 | 50.00 | 10.00 | 30.00 | 25.00 |"
    assert rows[4] == "| difference | +20.00 | -10.00 | +0.00 | +3.33 | -25.00 |"
    assert lost_groups(results) == {"mean": ["STS"]}
    assert "Lower than mean in STS." in render_row(results)


def test_the_suite_of_the_examples_loads() -> None:
    suite = load_suite(str(ROOT / "examples/suite.yaml"))
    assert len(suite.tasks[0].dataset["test"]) == 240
    assert len(read_texts_of(suite, 400)) == 400


def test_the_base_has_a_row_without_baselines_of_embeddings() -> None:
    results = EvalResults("gem")
    results.add_generation("MMLU", {"main_score": 0.25, "type": "mmlu", "metric": "acc"}, is_base=False)
    assert render_row(results).splitlines() == ["|  | MMLU |", "| --- | --- |", "| **gem** | 25.00 |"]
    results.add_generation("MMLU", {"main_score": 0.5, "type": "mmlu", "metric": "acc"}, is_base=True)
    rows = ["| base | 50.00 |", "| **gem** | 25.00 |", "| difference | -25.00 |"]
    assert render_row(results).splitlines()[2:] == rows


def test_a_checkpoint_may_be_named_as_a_baseline_is() -> None:
    results = EvalResults("echo")
    for name, value in ((None, 0.4), ("echo", 0.1)):
        results.add_embedding("A", {"main_score": value, "type": "STS", "metric": "m", "metrics": {}}, name)
    rows = ["| echo | 10.00 | 10.00 |", "| **echo** | 40.00 | 40.00 |", "| difference | +30.00 | +30.00 |"]
    assert render_row(results).splitlines()[2:5] == rows


def test_a_suite_of_knowledge_alone(
    make_checkpoint: Callable[..., str], make_base: Callable[..., Path], suite: str
) -> None:
    Path(suite).write_text(f"knowledge:{SUITE.partition('knowledge:')[2].partition('  - {name: lines')[0]}")
    results, saved, _ = run(make_checkpoint(), suite, make_base())
    assert "| difference | +0.00 |" in render_row(results)
    assert saved["retention"]["num_texts"] > len(CORPUS)
    assert saved["retention"]["tasks"].keys() == {"Trivia"}


def test_a_card_without_a_section_gets_one() -> None:
    section = "<!-- gem-st eval: start -->\nnew\n<!-- gem-st eval: end -->"
    assert insert_section("# Mine\n", section) == f"# Mine\n\n## Evaluation\n\n{section}\n"
    kept = insert_section("# Mine\n\n## Evaluation\n\nBy hand: 3.\n\n## Use\n", section)
    assert kept == f"# Mine\n\n## Evaluation\n\n{section}\n\nBy hand: 3.\n\n## Use\n"
    assert insert_section(kept, section.replace("new", "newer")) == kept.replace("new\n", "newer\n")
