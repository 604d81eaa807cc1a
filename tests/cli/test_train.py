"""gem-st train: settings, data, the run, its report, the dry run, and what is refused before the first step."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value, load_dataset
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from typer.testing import CliRunner

from gem_st import GemLoss, TwoPhaseLearningRate
from gem_st.cli import app
from gem_st.instructions import task_prompts
from gem_st.training.data import load_source, sample_texts, set_aside
from gem_st.training.preview import count_tokens, estimate_memory, preview, render
from gem_st.training.report import render_report
from gem_st.training.run import (
    TrainConfig,
    TrainResult,
    _without_folders,
    build_arguments,
    build_trainer,
    load_config,
    load_data,
    loss_options,
    self_generated,
    train,
)

from ..conftest import BASE_8M, CHECKPOINTING, CORPUS, ROOT
from ..gguf_files import write_gguf

PAIRS = {"anchor": CORPUS, "positive": CORPUS[::-1]}


@pytest.fixture(autouse=True)
def _plain(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")  # typer wraps what it prints
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def texts(tmp_path) -> Path:
    """Forty texts, one a line."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"{text[:-1]}, number {index}." for index in range(5) for text in CORPUS) + "\n")
    return path


@pytest.fixture
def make_config(make_base, texts, tmp_path):
    """Function that makes settings of a training of seconds."""

    def make(**options) -> TrainConfig:
        arguments = {"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, **options.pop("training_arguments", {})}
        settings = {
            **{"base": make_base(), "output": tmp_path / "out", "data": None if "self_generate" in options else texts},
            **{"steps": 4, "batch_size": 4, "max_length": 64, "precision": "float32", "held_out": 4},
            **options,
        }
        return load_config(**settings, training_arguments=arguments)

    return make


def invoke(*args: object):
    return CliRunner().invoke(app, ["train", *map(str, args)])


def refused(*args: object) -> str:
    """The one line that a command ends with."""
    result = invoke(*args)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


# ---- settings


def test_options_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "recipe: paper\nbase: b\nlearning_rate: 3e-5\nbatch_size: 64\ntraining_arguments: {save_steps: 7}\n"
    )
    config = load_config(path, batch_size=16, training_arguments={"report_to": "none"})
    assert (config.plain_ratio, config.learning_rate, config.batch_size) == (0.8, 3e-5, 16)
    assert config.training_arguments == {"save_steps": 7, "report_to": "none"}


def test_the_recipe_of_the_paper_is_its_table(make_base, tmp_path):
    config = load_config(recipe="paper", base=str(make_base(max_position_embeddings=1024)), data="x")
    config.check()
    config = config.resolve(num_rows=config.num_rows, columns=["text"], context=1024)
    assert config.mode == "full"
    assert config.num_rows == 32_000
    assert config.batch_size == 32
    assert config.steps == 1_000
    assert config.max_length == 512
    assert config.num_gem_tokens == 1
    assert config.plain_ratio == 0.8
    assert config.tasks == ["reconstruction"]
    assert config.scale == 20
    assert config.describe()["rise_steps"] == 0
    options = loss_options(config)
    assert [options["alpha"](step, 1_000) for step in (0, 99, 100, 101, 999)] == [0, 0, 1, 1, 1]
    data = load_data_of(config, Dataset.from_dict({"text": CORPUS}))
    model = build(config)
    trainer = build_trainer(config, model, GemLoss(model, **options), data)
    assert trainer.args.max_steps == 1_000
    assert trainer.args.train_batch_size == 32
    (rates,) = (part for part in trainer.callback_handler.callbacks if isinstance(part, TwoPhaseLearningRate))
    assert [rates.rate(step, 1_000) for step in (0, 99, 100)] == [1e-4, 1e-4, 1e-5]
    assert rates.rate(550, 1_000) == pytest.approx(0.5e-5)  # the middle of a cosine
    assert rates.rate(1_000, 1_000) == pytest.approx(0)
    assert model[0].logit_scale.exp().item() == pytest.approx(20)


def load_data_of(config, dataset):
    from gem_st.training.data import TrainData

    return TrainData(dataset, ["text"], len(dataset), [])


def build(config):
    from gem_st.training.run import build_model

    return build_model(config)


@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_defaults_of_the_modes_are_those_of_the_loss(make_config, make_base, mode):
    config = make_config(mode=mode).resolve(40, ["text"], 256)
    model = build(config)
    stock = GemLoss(model)
    for columns in (["text"], ["context", "summary"], ["prompt", "answer"], ["anchor", "positive"]):
        resolved = make_config(mode=mode, steps=1_000).resolve(40, columns)
        plan = stock._plan(columns)
        assert (plan.plain_ratio, plan.alpha) == (resolved.plain_ratio, loss_options(resolved)["alpha"])
        assert plan.plain_ratio == 1 or list(plan.tasks) == resolved.tasks
    assert stock.plain_ratio == config.plain_ratio
    assert stock.token_dropout == config.token_dropout
    if mode == "frozen":
        assert GemLoss(model, plain_ratio=0.5).alpha == make_config(mode=mode, plain_ratio=0.5).resolve(4, ["a"]).alpha


def test_the_phase_of_alpha_0_is_a_share_of_the_training(make_config):
    config = make_config(steps=50).resolve(40, ["text"], 256)
    assert (config.ntp_steps, config.rise_steps) == (0.2, None)
    assert (config.learning_rate, config.final_alpha, config.max_length) == (1e-4, 0.9, 64)


def test_epochs_count_steps(make_config, monkeypatch):
    options = {"steps": None, "epochs": 2, "training_arguments": {"gradient_accumulation_steps": 3}}
    assert make_config(**options).resolve(40, ["text"]).steps == 8  # 10 batches, 4 steps
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_config(**options).resolve(40, ["text"]).steps == 4  # 5 batches on each of 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp: 3", "no setting 'stesp'. Did you mean 'steps'"),
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("steps: 2.5", "steps must be a whole number, got 2.5"),
        ("steps: .nan", "steps must be a whole number, got nan"),
        ("streaming: 3", "streaming must be true or false, got 3"),
        ("columns: {a: b}", "columns must be a list of names"),
        ("training_arguments: 3", "training_arguments must be a mapping"),
        ("- steps", "must hold settings as `name: value`, got list"),
        ("a: b: c", "is not YAML"),
        ("recipe: papre", "no recipe 'papre', but paper"),
    ],
)
def test_a_file_that_cannot_be_meant(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert message in refused("--config", tmp_path / "a.yaml")


def test_a_file_that_is_not_there(tmp_path):
    assert "no settings file" in refused("--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": None}, "base is missing"),
        ({"data": None}, "Neither data nor self_generate is given"),
        ({"mode": "half"}, "mode must be one of full, frozen, lora, qlora, got 'half'"),
        ({"precision": "int8"}, "precision must be one of auto, float32"),
        ({"plain_ratio": 1.5}, r"plain_ratio must be in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"final_alpha": 2.0}, r"final_alpha must be in \[0, 1\], got 2.0"),
        ({"scale": 0.5}, r"scale must be in \[1, 100\]"),
        ({"num_gem_tokens": 0}, "num_gem_tokens must be 1 or more, got 0"),
        ({"batch_size": 1}, "batch_size must be 2 or more, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"tasks": ["translation"]}, "no task 'translation', but continuation, reconstruction, soft_prompt, summary"),
        ({"data": "x", "self_generate": 10}, "data and self_generate exclude each other"),
        ({"steps": 4, "epochs": 1.0}, "steps and epochs exclude each other"),
        ({"alpha": 0.0, "ntp_steps": 0}, "alpha and ntp_steps exclude each other"),
        ({"alpha": 0.0, "final_alpha": 0.0}, "alpha and final_alpha exclude each other"),
        ({"training_arguments": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps must be a whole"),
        ({"alpha": 0.5, "ntp_learning_rate": 1e-4}, "alpha and ntp_learning_rate exclude each other"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"streaming": True, "steps": None}, "streaming needs steps"),
        ({"lora_rank": 8}, "lora_rank is for the modes frozen, lora and qlora"),
        ({"gem_tokens": ["reserved"]}, "gem_tokens are for the mode frozen"),
        ({"plain_ratio": 1.0, "tasks": ["continuation"]}, "plain_ratio is 1"),
        ({"mode": "frozen", "ntp_learning_rate": 1e-4}, "set ntp_steps, too"),
        ({"ntp_learning_rate": 1e-4, "ntp_steps": 0}, "set ntp_steps, too"),
        ({"eval_columns": ["a"]}, "belong to eval_data"),
        ({"training_arguments": {"max_steps": 3}}, "training_arguments.max_steps is the option 'steps'"),
        ({"training_arguments": {"sav_steps": 3}}, r"no training argument 'sav_steps'; near it are \['save_steps'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(make_config, options, message):
    config = make_config(**{"base": "no/such-model", **options})
    with pytest.raises(ValueError, match=message):
        train(config)


def test_rows_longer_than_the_base_can_read_are_refused_before_it_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="max_length 300 is more than the 256 tokens that the base can read"):
        train(make_config(max_length=300))
    assert make_config(max_length=None).resolve(40, ["text"], 256).max_length == 256


def test_precision_and_packages_are_those_of_this_machine(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        train(make_config(precision="fp16"))
    if not torch.accelerator.is_available():
        assert make_config(precision="auto").resolve(4, ["text"]).precision == "float32"
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match=r"mode 'qlora' needs bitsandbytes.*pip install bitsandbytes"):
        train(make_config(mode="qlora"))


# ---- data


def test_every_kind_of_file_is_read(tmp_path):
    data = Dataset.from_dict({"text": CORPUS})
    data.to_csv(str(tmp_path / "a.csv"), index=False)
    data.to_json(str(tmp_path / "a.jsonl"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.to_csv(str(tmp_path / "a.tsv"), sep="\t", index=False)
    (tmp_path / "a.txt").write_text("\n".join(CORPUS))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    data.save_to_disk(str(tmp_path / "saved"))
    folder = tmp_path / "folder"
    folder.mkdir()
    Dataset.from_dict({"text": CORPUS[:3]}).to_json(str(folder / "train.jsonl"))
    Dataset.from_dict({"text": CORPUS[3:]}).to_json(str(folder / "test.jsonl"))
    for name in ("a.csv", "a.jsonl", "a.parquet", "a.tsv", "a.txt", "a.csv.gz", "saved"):
        assert load_source(str(tmp_path / name))["text"] == CORPUS, name
        assert [row["text"] for row in load_source(str(tmp_path / name), streaming=True)] == CORPUS, name
    assert load_source(str(tmp_path / "a.csv"), split="train[:2]")["text"] == CORPUS[:2]
    assert load_source(str(folder))["text"] == CORPUS[:3]
    assert load_source(str(folder), split="test")["text"] == CORPUS[3:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "There is no file or folder"),
        ("./none", "There is no file or folder"),
        ("a.docx", "is of no kind that can be read. Known are .csv, .tsv"),
        ("empty", "cannot be read as a folder of such files"),
        ("broken.csv", "cannot be read as a file (split 'train'): Error tokenizing data"),
        ("no/such-dataset", "cannot be read as a data set of the Hub"),
    ],
)
def test_a_source_that_cannot_be_read(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("a")
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(name)


def test_rows_to_measure_with_come_after_those_to_train_on_if_there_are_any():
    data = Dataset.from_dict({"text": [str(index) for index in range(100)]})
    train_rows, held_out = set_aside(data, 80, 16, seed=0)
    assert (len(train_rows), len(held_out)) == (80, 16)
    assert not set(train_rows["text"]) & {row["text"] for row in held_out}
    train_rows, held_out = set_aside(data, None, 16, seed=0)
    assert (len(train_rows), len(held_out)) == (90, 10)  # a tenth at most
    assert set(train_rows["text"]) | {row["text"] for row in held_out} == set(data["text"])
    assert set_aside(data, None, 0, seed=0)[1] == []


@pytest.mark.parametrize("streaming", [False, True])
def test_columns(make_config, tmp_path, streaming):
    path = tmp_path / "a.jsonl"
    Dataset.from_dict({**PAIRS, "id": list(range(8))}).to_json(str(path))
    options = {"data": str(path), "streaming": streaming, "held_out": 0}
    assert load_data(make_config(**options, columns=["positive", "anchor"])).columns == ["positive", "anchor"]
    with pytest.raises(ValueError, match=r"Column 'id' of the training set holds int.*anchor \(str.*--columns"):
        load_data(make_config(**options))
    with pytest.raises(ValueError, match=r"has no column 'ancor', but \['anchor', 'positive', 'id'\]. .*'anchor'"):
        load_data(make_config(**options, columns=["ancor"]))
    Dataset.from_dict({"id": list("abcdefgh"), "text": CORPUS}).to_json(str(path))
    assert load_data(make_config(**options)).columns == ["text"]


def test_an_evaluation_set_needs_its_columns(make_config, tmp_path):
    path = tmp_path / "eval.csv"
    Dataset.from_dict({**PAIRS, "score": [1.0] * 8}).to_csv(str(path), index=False)
    with pytest.raises(ValueError, match="must hold different, finite numbers"):
        load_data(make_config(eval_data=str(path)))
    with pytest.raises(ValueError, match=r"evaluation set has no column 'b'"):
        load_data(make_config(eval_data=str(path), eval_columns=["b"]))
    with pytest.raises(ValueError, match="the score 'score', which takes two columns of text"):
        load_data(make_config(eval_data=str(path), eval_columns=["anchor", "score"]))
    assert load_data(make_config(eval_data=str(path), eval_columns=["anchor"])).eval_set.column_names == ["anchor"]


def test_texts_that_a_base_writes_are_whole_different_sentences():
    model, tokenizer = (kind.from_pretrained(BASE_8M) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model = model.float()
    runs = []
    for _ in range(2):
        set_seed(3)
        runs.append(sample_texts(model, tokenizer, 6, batch_size=16, max_new_tokens=40))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6
    assert all(16 <= len(text) <= 256 and text[-1] in ".!?" for text in runs[0])
    with pytest.raises(ValueError, match="wrote 0 of 6 sentences, and no new one in 10 batches"):
        sample_texts(model, tokenizer, 6, batch_size=1, max_new_tokens=2)


# ---- the run


def test_a_training_leaves_a_checkpoint_and_a_report(make_config, make_base, texts, tmp_path):
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"base": str(make_base()), "data": str(texts), "steps": 4, "mode": "full"})
    )
    result = invoke(
        *("--config", tmp_path / "a.yaml", "--output", tmp_path / "out", "-k", 2, "-p", 0.5, "--batch-size", 4),
        *("--max-length", 64, "--precision", "float32", "--held-out", 4, "--ntp-steps", 1, "--rise-steps", 0),
        *("--ntp-learning-rate", "1e-3", "--learning-rate", "1e-4"),
        *("-a", "logging_steps=1", "-a", "use_cpu=true", "-a", "disable_tqdm=true"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"perplexity of held-out text +[\d.]+ +[\d.]+\n", result.output)
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert model[0].num_gem_tokens == 2
    assert model.encode(CORPUS).shape == (8, 32)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    log = [entry for entry in report["log_history"] if "ntp" in entry]
    assert [entry["alpha"] for entry in log] == pytest.approx([0, 0.9, 0.9, 0.9])
    assert [entry["learning_rate"] for entry in log][:2] == pytest.approx([1e-3, 1e-4])
    assert report["num_rows"] == 36
    assert report["settings"]["data"] == "texts.txt"
    assert (sum(report["after"]["positives"]), sum(report["after"]["negatives"])) == (4, 12)
    for name in ("perplexity of held-out text", "similarity of positives, mean"):
        assert report["before"]["metrics"][name] != report["after"]["metrics"][name]
    page = (tmp_path / "out" / "report.html").read_text()
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == 3
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r"https?://|<script|<link", page)
    for heading in ("Before and after", "Losses", "Similarities", "Text written back", "What it still writes"):
        assert heading in page
    assert str(tmp_path) not in page

    settings = ("--config", tmp_path / "a.yaml", "--output", tmp_path / "out")
    assert "holds a training already (modules.json). Set resume" in refused(*settings)


def test_a_frozen_base_writes_what_it_wrote_and_a_lora_is_an_adapter(make_config):
    config = make_config(mode="frozen", lora_rank=4, training_arguments={"save_strategy": "no"})
    result = train(config)
    assert result.before["perplexity of held-out text"] == result.after["perplexity of held-out text"]
    report = json.loads((result.folder / "report.json").read_text())
    assert report["before"]["paragraph"] == report["after"]["paragraph"]
    assert "no reconstruction task" in result.report.read_text()
    assert (result.folder / "gem_adapter").is_dir()

    options = {"mode": "lora", "lora_rank": 4, "dtype": "bfloat16", "training_arguments": {"save_strategy": "no"}}
    model = build(make_config(**options))
    GemLoss(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    result = train(make_config(**options, overwrite=True))
    model = SentenceTransformer(str(result.folder), trust_remote_code=True, device="cpu")
    assert model[0].has_adapter
    assert json.loads((result.folder / "report.json").read_text())["settings"]["learning_rate"] == 5e-4


def test_a_gguf_file_is_a_base(make_config, make_model, texts, tmp_path):
    dense = make_model(num_reserved=2, hidden_size=64, intermediate_size=64, head_dim=16)
    base = write_gguf(dense[0], tmp_path / "models.gguf", quantized="Q8_0")
    options = ["--base", base, "--data", texts, "--mode", "frozen", "--gem-tokens", "reserved", "--max-length", 20]
    shown = invoke(*options, "--dry-run")
    assert shown.exit_code == 0, shown.output + str(shown.exception)
    config = make_config(base=base, output=None, mode="frozen", gem_tokens=["reserved"])
    result = train(config)
    assert result.folder.name == "gem-models"
    assert result.before["perplexity of held-out text"] == result.after["perplexity of held-out text"]
    assert not list(result.folder.glob("model*.safetensors"))
    assert train(dataclasses.replace(config, resume=True)).folder == result.folder
    model = SentenceTransformer(str(result.folder), trust_remote_code=True, device="cpu")
    assert model.encode(CORPUS).shape == (8, 64)


def test_a_resumed_training_has_the_rows_it_was_started_with(make_config, make_base):
    config = make_config(base=make_base(num_reserved=2), mode="frozen", gem_tokens=["trained"])
    train(config)  # as it was by default before existing rows were
    resumed = dataclasses.replace(config, gem_tokens=None, resume=True)
    assert build(resumed)[0].gem_tokens.names is None
    for gem_tokens in (["reserved"], ["<|reserved_special_token_0|>"]):
        with pytest.raises(ValueError, match="Resume without gem_tokens"):
            train(dataclasses.replace(resumed, gem_tokens=gem_tokens))
    train(dataclasses.replace(config, gem_tokens=["<|reserved_special_token_0|>"], overwrite=True))
    assert build(resumed)[0].gem_tokens.names == ["<|reserved_special_token_0|>"]
    with pytest.raises(ValueError, match="Resume without gem_tokens"):
        train(dataclasses.replace(config, resume=True))


def test_a_stream_of_pairs_with_a_graded_evaluation_set(make_config, tmp_path):
    path = tmp_path / "pairs.jsonl"
    Dataset.from_dict({name: texts * 4 for name, texts in PAIRS.items()}).to_json(str(path))
    graded = tmp_path / "graded.csv"
    Dataset.from_dict({**PAIRS, "score": [0, 1, 2, 3, 4, 5, 4, 3]}).to_csv(str(graded), index=False)
    result = train(make_config(data=str(path), streaming=True, eval_data=str(graded), steps=5))
    assert {"Spearman on the evaluation set", "similarity of positives, mean"} <= set(result.before) & set(result.after)
    report = json.loads((result.folder / "report.json").read_text())
    assert report["num_rows"] is None
    assert report["columns"] == ["anchor", "positive"]
    assert len([entry for entry in report["log_history"] if "eval_spearman_cosine" in entry]) == 5


def test_an_evaluation_set_of_texts_gives_a_loss(make_config, texts):
    result = train(make_config(eval_data=str(texts), eval_split="train", training_arguments={"save_strategy": "no"}))
    name = "loss on the evaluation set"
    assert math.isfinite(result.before[name])
    assert result.before[name] != result.after[name]


def test_instructions_are_stored_and_not_trained_with(make_config, tmp_path, monkeypatch):
    reports: list[dict] = []
    monkeypatch.setattr("gem_st.training.run.write_report", lambda folder, content: reports.append(content))
    Dataset.from_dict(
        {"sentence1": CORPUS, "sentence2": CORPUS[::-1], "score": [index / 8 for index in range(8)]}
    ).to_csv(tmp_path / "graded.csv")
    options = {"eval_data": tmp_path / "graded.csv", "steps": 2, "training_arguments": {"save_steps": 1}}
    told = train(make_config(**options, instructions=True))
    plain = train(make_config(**options, output=tmp_path / "plain"))
    assert told.after == plain.after
    losses = [[entry.get("loss") for entry in report["log_history"]] for report in reports]
    assert losses[0] == losses[1]
    assert [report["settings"].get("instructions") for report in reports] == [True, None]
    for folder in (told.folder, told.folder / "checkpoint-1", plain.folder):
        prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
        stored = {} if folder == plain.folder else task_prompts()
        assert prompts == {"query": "", "document": "", **stored}


def test_instructions_on_the_command_line(texts, make_base):
    options = ("--base", make_base(), "--data", texts, "--dry-run", "--json")
    shown = [json.loads(invoke(*options, *more).stdout)["settings"] for more in ((), ("--instructions",))]
    assert [settings.get("instructions") for settings in shown] == [None, True]


def test_a_training_that_is_resumed_ends_like_one_that_was_not(make_config, tmp_path):
    options = {"ntp_steps": 2, "training_arguments": {"save_steps": 2}}
    whole = train(make_config(**options, output=tmp_path / "whole"))
    cut = tmp_path / "cut"
    train(make_config(**options, output=cut))
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "checkpoint-3").mkdir()  # cut off while it was written
    resumed = train(make_config(**options, output=cut, resume=True))
    assert resumed.before == whole.before
    assert resumed.after == pytest.approx(whole.after)
    logs = [json.loads((path / "report.json").read_text())["log_history"] for path in (tmp_path / "whole", cut)]
    assert [entry.get("loss") for entry in logs[1]] == [entry.get("loss") for entry in logs[0]]
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* to resume from"):
        train(make_config(**options, output=tmp_path / "new", resume=True))


def test_the_base_writes_its_own_data(make_config):
    config = make_config(base=BASE_8M, self_generate=20, steps=1, training_arguments={"save_strategy": "no"})
    train(config)
    path = config.folder / "generated.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 20
    assert load_data(make_config(base=BASE_8M, self_generate=20)).num_rows == 18  # read again, two of them held out


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"ntp_steps": 5}])
def test_a_frozen_base_has_nothing_to_learn_from_plain_rows_alone(make_config, options):
    with pytest.raises(ValueError, match="learns nothing from plain rows while alpha is 0"):
        train(make_config(mode="frozen", **options))
    make_config(mode="frozen", plain_ratio=0.5, **options).resolve(40, ["text"])
    assert make_config(mode="frozen", final_alpha=0.5).resolve(40, ["text"]).ntp_steps == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": []}, "no rows"),
        ({"text": ["one"]}, "has one row"),
        ({"text": ["", " "]}, "Column 'text' of the training set is empty"),
        ({"text": ["a", None]}, r"Row [01] of column 'text' of the training set is None"),
        ({"text": ["same"] * 8}, "are all the same, 'same'"),
        ({"text": [1, 2, 3]}, "Column 'text' of the training set holds int64, and not text"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused_before_the_base_is_loaded(
    make_config, tmp_path, monkeypatch, columns, message, streaming
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    features = None if columns["text"] else Features({"text": Value("string")})
    Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=message):
        train(make_config(data=str(tmp_path / "a.parquet"), streaming=streaming, held_out=0))


def test_a_loss_that_is_no_number_ends_the_training_in_one_line(make_config, texts, monkeypatch):
    monkeypatch.setattr("gem_st.losses.gem_loss.info_nce", lambda *args: torch.tensor(math.nan))
    config = make_config()
    result = invoke("--base", config.base, "--data", texts, "--steps", 2, "--max-length", 64, "--alpha", 0.5)
    assert result.exit_code == 1
    assert re.search(r"gem-st: The loss is nan at step 1 of 2 \(.*lower learning rate", result.stderr.splitlines()[-1])


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_become_prompts_and_answers(make_config, make_base, tmp_path, streaming):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    base = make_base(chat_template=template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in CORPUS * 2]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row, "id": index}) + "\n" for index, row in enumerate(rows)))
    config = make_config(base=base, data=str(path), mode="frozen", streaming=streaming, held_out=4, max_length=200)
    shown = preview(config)
    assert shown.columns == ["prompt", "answer"]
    assert (shown.settings["tasks"], shown.settings["plain_ratio"], shown.settings["alpha"]) == (
        ["soft_prompt"],
        0.5,
        0.7,
    )
    assert [kind for kind, _ in shown.rows[::2]] == ["plain", "soft_prompt", "plain"]
    prefix, _, suffix = ("".join(tokens) for _, tokens in shown.rows[2][1])
    assert prefix.startswith("<bos><user>")
    assert prefix.endswith("\\n<assistant>")
    assert suffix.strip("\\n") in [text[::-1] for text in CORPUS]
    result = train(config)
    assert "similarity of positives, mean" in result.after
    assert json.loads((result.folder / "report.json").read_text())["settings"]["tasks"] == ["soft_prompt"]
    with pytest.raises(ValueError, match="the tokenizer has none"):
        train(make_config(data=str(path), streaming=streaming, output=tmp_path / "other"))


# ---- the report


def test_text_in_a_report_is_escaped():
    side = {"metrics": {"<b>": 1.0}, "samples": [{"text": "<script>x</script>", "written": "&"}]}
    side["paragraph"] = {"prompt": "<i>", "written": "</pre>"}
    content = {"settings": {"base": "<a>", "steps": 1, "mode": "full"}, "after": side, "log_history": [], "seconds": 1}
    page = render_report({**content, "num_rows": 3, "columns": ["<c>"], "before": None, "versions": {}}, {})
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert not re.search(r"<script|<b>|<i>|<a>|<c>", page)


def test_without_matplotlib_the_report_has_no_pictures(make_config, monkeypatch, warnings_of_transformers):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = train(make_config(steps=1, held_out=0, training_arguments={"save_strategy": "no"}))
    assert 'pip install "gem-st[report]"' in warnings_of_transformers.text
    page = result.report.read_text()
    assert "<img" not in page
    assert "No rows were held out" in page


# ---- the dry run


def test_a_dry_run_shows_rows_mask_settings_and_memory(make_base, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights are read
    base = make_base(max_position_embeddings=128)
    result = invoke("--base", base, "--data", texts, "-k", 2, "-p", 0.5, "--max-length", 20, "--dry-run")
    assert result.exit_code == 0, result.output + str(result.exception)
    lines = result.output.splitlines()
    assert "\x1b" not in result.output
    kinds = [line.split()[0] for line in lines if "[GEM 1]" in line and not line.startswith(" ")]
    assert kinds == ["plain", "reconstruction", "continuation"]
    (repeated,) = (line for line in lines if line.startswith("reconstruction"))
    prefix, gem, suffix = repeated.removeprefix("reconstruction").strip().split(" | ")
    assert gem == "[GEM 1][GEM 2]"
    assert prefix == "<bos>" + suffix.rstrip()
    assert [line for line in lines if re.fullmatch(r"[abGHcd]( [x.]){6}", line)] == [
        *("a x . . . . .", "b x x . . . .", "G x x x . . .", "H x x . x . .", "c . . x x x .", "d . . x x x x")
    ]
    assert re.search(r"rows 36; columns text; [\d.]+ tokens on average", result.output)
    assert re.search(r"max_length, to be cut: (?!0\.0)[\d.]+%", result.output)
    assert re.search(r"\nlearning_rate +0.0001\n", result.output)
    assert re.search(r"in all +0\.\d+", result.output)
    assert not (tmp_path / f"gem-{base.name}").exists()


def test_a_dry_run_in_colour_and_as_json(make_config, texts):
    shown = preview(make_config(plain_ratio=0.0, tasks=["reconstruction"]))
    page = render(shown, color=True)
    assert re.search(r"\x1b\[36m\x1b\[22m<bos>.*\x1b\[0m \| \x1b\[35m\x1b\[1m\[GEM 1\]\x1b\[0m \| \x1b\[32m", page)
    config = make_config()
    args = ("--base", config.base, "--data", texts, "--max-length", 64, "--dry-run", "--json")
    assert json.loads(invoke(*args).stdout)["num_rows"] == 36


def test_a_dry_run_of_pairs_of_a_stream_and_of_texts_to_be_written(make_config, tmp_path):
    Dataset.from_dict(PAIRS).to_json(str(tmp_path / "pairs.jsonl"))
    shown = preview(make_config(data=str(tmp_path / "pairs.jsonl"), streaming=True, mode="frozen", held_out=0))
    assert shown.num_rows is None
    assert [kind.strip() for kind, _ in shown.rows] == ["plain", "positive"] * 3
    shown = preview(make_config(base=BASE_8M, self_generate=5000, mode="frozen", held_out=100))
    assert shown.num_rows == 4900
    assert len(shown.rows) == 6
    assert not (tmp_path / "out").exists()


def test_memory_counts_what_is_there(make_config, make_base):
    config = make_config(mode="full", plain_ratio=1.0, token_dropout=0.5).resolve(40, ["text"], 256)
    estimate = estimate_memory(config, 1, 10)
    num_parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(make_base())).num_parameters()
    assert estimate["weights"] * 2**30 == 4 * num_parameters == estimate["gradients"] * 2**30
    assert estimate["optimizer"] == 2 * estimate["gradients"]
    assert count_tokens(config, 1, 10) == (
        4 * 10 + 4 * 5 + 8,
        0,
        40,
    )  # texts, views, GEM tokens; targets are the texts'
    frozen = make_config(mode="frozen", lora_rank=4).resolve(40, ["text"], 256)
    # q, k, v, o and three of the feed-forward, of width 32 and 48, twice; and one GEM token
    num_trained = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48)) + 32
    assert estimate_memory(frozen, 1, 10)["gradients"] * 2**30 == 4 * num_trained
    assert count_tokens(frozen, 2, 10) == (8, 80, 0)
    less = make_config(training_arguments=CHECKPOINTING).resolve(40, ["text"], 256)
    assert estimate_memory(less, 1, 10)["activations"] < estimate["activations"]


def test_the_settings_that_ship_are_valid():
    for path in (ROOT / "examples" / "recipes").glob("*.yaml"):
        config = load_config(path)
        config.check()
        assert (ROOT / str(config.base)).is_dir()
        assert len(load_dataset("text", data_files=str(ROOT / str(config.data)), split="train")) > 1000


def test_the_commands_and_options_that_docs_show_exist(tmp_path, monkeypatch):
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md"))
    commands = re.findall(r"^gem-st train ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 10
    checked = []

    def check(config):
        config.check()
        checked.append(config)
        return TrainResult(Path("a"), Path("b"), {}, {})

    monkeypatch.setattr("gem_st.training.run.train", check)
    monkeypatch.setattr("gem_st.training.preview.preview", check)
    monkeypatch.setattr("gem_st.training.preview.render", lambda shown, color: str(shown))
    monkeypatch.chdir(ROOT)
    for command in commands:
        result = invoke(*shlex.split(command.replace("\\\n", " "), comments=True))
        assert result.exit_code == 0, (command, result.output)
    assert len(checked) == len(commands)
    options = set(re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / "training.md").read_text(encoding="utf-8")))
    known = {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(TrainConfig)}
    assert known - {"--training-arguments"} == options - {"--config", "--dry-run"}


def test_a_checkpoint_is_saved_whatever_becomes_of_the_report(make_config, monkeypatch):
    from gem_st.training import run as module

    results = iter([{"metrics": {}}])
    monkeypatch.setattr(module, "measure", lambda *args: next(results))  # the second is a StopIteration
    config = make_config(training_arguments={"save_strategy": "no"})
    with pytest.raises(StopIteration):
        module.train(config)
    assert SentenceTransformer(str(config.folder), trust_remote_code=True, device="cpu").encode("a").shape == (32,)


def test_trackers_and_other_arguments_reach_the_trainer(make_config):
    config = make_config(training_arguments={"report_to": ["tensorboard"], "save_steps": 3}).resolve(40, ["text"])
    arguments = build_arguments(config, load_data(config))
    assert arguments.report_to == ["tensorboard"]
    assert (arguments.save_steps, arguments.max_steps, arguments.per_device_train_batch_size) == (3, 4, 4)


# ---- nothing is lost


def test_base_data_and_foreign_files_in_the_output_folder_are_not_written_over(make_config, make_base, texts, tmp_path):
    base = tmp_path / "mine"
    shutil.copytree(make_base(), base)
    data = tmp_path / "out" / "texts.txt"
    data.parent.mkdir()
    shutil.copyfile(texts, data)
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    for options, message in (
        ({"base": str(base), "output": str(base)}, "base .* lies in the output folder"),
        ({"data": str(data), "output": str(data.parent), "overwrite": True}, "data .* lies in the output folder"),
        ({"output": str(project)}, r"is not empty \(it holds README.md\), and no training"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_config(**options))
    assert data.exists()


def test_overwrite_removes_nothing_before_the_next_training_can_start(make_config, tmp_path):
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="There is no file or folder"):
        train(make_config(output=str(folder), overwrite=True, data=str(tmp_path / "typo.txt")))
    assert (folder / "checkpoint-2").exists()


def test_a_resumed_training_is_of_the_same_model(make_config, tmp_path):
    folder = tmp_path / "out"
    train(make_config(output=str(folder), steps=2, training_arguments={"save_steps": 1}))
    (folder / "report.json").write_text('{"before": {"met')  # cut off by whatever killed the first run
    with pytest.raises(ValueError, match="was trained with num_gem_tokens=1, not 2"):
        train(make_config(output=str(folder), steps=3, num_gem_tokens=2, resume=True))
    assert train(make_config(output=str(folder), steps=3, resume=True)).after


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("num_rows", 12), ("teacher", "other")])
def test_a_resumed_training_reads_the_same_data(make_config, tmp_path, name, value):
    folder = str(tmp_path / "out")
    train(make_config(output=folder, steps=2, training_arguments={"save_steps": 1}))
    with pytest.raises(ValueError, match=f"was started with {name}=.*, not {value}. Resume with the settings"):
        train(make_config(output=folder, steps=3, resume=True, **{name: value}))


def test_texts_of_another_seed_are_not_taken_for_ones_own(make_config, tmp_path, monkeypatch):
    write = lambda base, num, seed: [f"{seed} {index}" for index in range(num)]  # noqa: E731
    monkeypatch.setattr("gem_st.training.run.generate_texts", write)
    first, again, other = (make_config(self_generate=3, seed=seed) for seed in (0, 0, 1))
    assert self_generated(first) == self_generated(again) == ["0 0", "0 1", "0 2"]
    assert self_generated(other) == ["1 0", "1 1", "1 2"]


def test_secrets_and_folders_are_not_reported(make_config, tmp_path):
    config = make_config(training_arguments={"hub_token": "hf_secret", "logging_dir": str(tmp_path)})
    shown = _without_folders(config.describe()["training_arguments"])
    assert (shown["hub_token"], shown["logging_dir"]) == ("***", tmp_path.name)
    assert config.training_arguments["hub_token"] == "hf_secret"


def test_options_beside_the_recipe_win_over_what_they_exclude(texts):
    alpha = load_config(recipe="paper", alpha=0.5)
    assert (alpha.alpha, alpha.ntp_steps, alpha.ntp_learning_rate) == (0.5, None, None)
    assert load_config(recipe="paper", self_generate=100).num_rows is None
    assert load_config(recipe="paper", plain_ratio=1).tasks is None
    for options in ({"alpha": 0.5}, {"plain_ratio": 1.0}, {"ntp_steps": 0}):
        load_config(recipe="paper", base="b", data=str(texts), **options).check()


def test_splits_and_subsets_are_not_ignored(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="is one data set, of which split 'test' cannot be taken"):
        load_source(str(tmp_path / "saved"), split="test")
    with pytest.raises(ValueError, match="subset 'x' is of data sets of the Hub"):
        load_source(str(tmp_path / "saved"), subset="x")
