"""The generation side, against plain transformers and lm-eval's own definitions of its tasks."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_st.evaluation import lm_eval_tasks as generation
from gem_st.evaluation import perplexity
from gem_st.evaluation.lm_eval_tasks import KINDS, GenerationTask, check_task, evaluate_generation, retry_smaller

from ..conftest import CORPUS, SHARED

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
NOUNS = ["bread", "a boat", "the sea", "an apple", "the clock", "good news", "a river", "light"]


def write_mmlu(folder: Path, sizes: dict[str, int], num_examples: int = 5) -> GenerationTask:
    for name, numbers in (("test", sizes), ("dev", dict.fromkeys(sizes, num_examples))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["subject", "question", "A", "B", "C", "D", "answer"])
            for subject, number in numbers.items():
                for i in range(number):
                    options = [NOUNS[(i + j) % 8] for j in range(4)]
                    writer.writerow([subject, f" What is in {name} {i},\n of {subject}?", *options, "ABCD"[i % 4]])
    return GenerationTask("MMLU", "mmlu", folder / "test.csv", folder / "dev.csv")


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_others(folder: Path) -> dict[str, GenerationTask]:
    """A task of each type but MMLU."""
    arc = [
        {"id": i, "question": text[:20], "choices": NOUNS[i % 3 : i % 3 + 4], "labels": list("1234"), "answer": "2"}
        for i, text in enumerate(CORPUS)
    ]
    hellaswag = [
        {
            "activity_label": "Life",
            "ctx_a": text[:12] + " [title]",
            "ctx_b": "the man",
            "endings": [other[-10 - 2 * i :] for i, other in enumerate(CORPUS[1:5])],
            "label": len(text) % 4,
        }
        for text in CORPUS
    ]
    lambada = [{"text": text.rstrip(".")} for text in CORPUS]
    (folder / "texts.txt").write_text("\n\n".join(CORPUS) + "\n")
    return {
        "arc_easy": GenerationTask("ARC", "arc_easy", write_jsonl(folder / "arc.jsonl", arc)),
        "hellaswag": GenerationTask("HellaSwag", "hellaswag", write_jsonl(folder / "hellaswag.jsonl", hellaswag)),
        "lambada": GenerationTask("LAMBADA", "lambada", write_jsonl(folder / "lambada.jsonl", lambada)),
        "perplexity": GenerationTask("books", "perplexity", folder / "texts.txt"),
    }


@pytest.fixture
def load(make_base: Callable[..., Path]) -> Callable[..., tuple]:
    """Function that loads a random base and its tokenizer."""

    def load(architecture: str = "llama", **config: object) -> tuple:
        base = make_base(architecture, **config)
        return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)

    return load


@torch.inference_mode()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Log-probability of a continuation, by plain transformers; the tokenizer puts one token first."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    log_probs = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    return log_probs.gather(-1, ids[0, start:, None]).sum().item()


def best(model, tokenizer, context: str, options: list[str], normalise: bool = False) -> int:
    scores = [log_likelihood(model, tokenizer, context, f" {option}") for option in options]
    return int(
        np.argmax([score / (len(text) if normalise else 1) for score, text in zip(scores, options, strict=True)])
    )


# --------------------------------------------------------------------------------------------------------------------
# The same tasks as lm-eval's


class PlainLoader(yaml.SafeLoader):
    """Reads lm-eval's files without running the functions that they name."""


PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("mmlu", "mmlu/default/_default_template_yaml"),
        ("arc_easy", "arc/arc_easy.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("lambada", "lambada/lambada_openai.yaml"),
    ],
)
def test_prompts_and_metrics_are_lm_evals_own(kind, file):
    theirs = yaml.load((LM_EVAL_TASKS / file).read_text(), PlainLoader)
    ours = KINDS[kind].config
    assert ours == {key: theirs[key] for key in ours}
    assert "description" not in theirs
    if kind == "mmlu":
        assert theirs["fewshot_config"] == {"sampler": "first_n"}


def test_every_subject_of_mmlu_has_lm_evals_header():
    files = list((LM_EVAL_TASKS / "mmlu/default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        theirs = yaml.load(file.read_text(), PlainLoader)
        assert generation._mmlu_header(theirs["dataset_name"]) == theirs["description"]


# --------------------------------------------------------------------------------------------------------------------
# The same numbers as plain transformers


def test_mmlu_is_the_mean_over_subjects_of_the_letters_chosen(load, tmp_path):
    """Every option's log-likelihood by plain transformers, after a prompt written out here."""
    model, tokenizer = load(max_position_embeddings=2048)
    task = write_mmlu(tmp_path, {"world_history": 7, "law": 2})
    model.train()
    result = evaluate_generation(model, tokenizer, task, batch_size=4)
    assert model.training
    assert tokenizer.pad_token is None

    def block(row: dict[str, str]) -> str:
        options = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
        return f"{row['question'].strip()}\n{options}Answer:"

    rows = {name: list(csv.DictReader((tmp_path / f"{name}.csv").open(newline=""))) for name in ("test", "dev")}
    correct: dict[str, list[bool]] = {"world_history": [], "law": []}
    model.eval()
    for row in rows["test"]:
        header = "The following are multiple choice questions (with answers) about "
        prompt = f"{header}{row['subject'].replace('_', ' ')}.\n\n"
        for example in rows["dev"]:
            if example["subject"] == row["subject"]:
                prompt += f"{block(example)} {example['answer']}\n\n"
        chosen = "ABCD"[best(model, tokenizer, prompt + block(row), list("ABCD"))]
        correct[row["subject"]].append(chosen == row["answer"])
    assert result["correct"] == {name: "".join(str(int(c)) for c in row) for name, row in correct.items()}
    shares = [np.mean(row) for row in correct.values()]
    assert shares[0] != shares[1]  # so that the two averages below differ
    assert result["main_score"] == pytest.approx(np.mean(shares))
    assert result["metrics"]["acc_micro"] == pytest.approx(sum(map(sum, correct.values())) / 9)
    assert result["subjects"]["law"] == {"acc": shares[1], "n": 2}
    deviations = [np.std(row, ddof=1) / math.sqrt(len(row)) for row in correct.values()]
    assert result["stderr"] == pytest.approx(math.hypot(*deviations) / 2)
    assert (result["num_samples"], result["num_fewshot"], result["truncated"]) == (9, 5, 0)
    assert (result["type"], result["metric"], result["higher_is_better"]) == ("mmlu", "acc", True)
    json.dumps(result)
    limited = evaluate_generation(model, tokenizer, task, batch_size=4, limit=2)
    assert limited["correct"] == {name: row[:2] for name, row in result["correct"].items()}


def test_the_others_are_what_plain_transformers_gives(load, tmp_path):
    model, tokenizer = load()
    tasks = write_others(tmp_path)
    results = {name: evaluate_generation(model, tokenizer, task, batch_size=3) for name, task in tasks.items()}
    rows = {
        name: [json.loads(line) for line in task.data.read_text().splitlines()]
        for name, task in tasks.items()
        if name != "perplexity"
    }
    for normalise, metric in ((False, "acc"), (True, "acc_norm")):
        chosen = [
            best(model, tokenizer, f"Question: {row['question']}\nAnswer:", row["choices"], normalise)
            for row in rows["arc_easy"]
        ]
        assert results["arc_easy"]["metrics"][metric] == np.mean([choice == 1 for choice in chosen])
        chosen = [
            best(
                model,
                tokenizer,
                f"Life: {row['ctx_a'][:-8]}. The man",
                [text.strip() for text in row["endings"]],
                normalise,
            )
            for row in rows["hellaswag"]
        ]
        labels = [row["label"] for row in rows["hellaswag"]]
        assert results["hellaswag"]["metrics"][metric] == np.mean(np.equal(chosen, labels))
    assert results["arc_easy"]["metric"] == "acc"
    assert results["hellaswag"]["metric"] == "acc_norm"
    losses = []
    for row in rows["lambada"]:
        context, _, word = row["text"].rpartition(" ")
        losses.append(log_likelihood(model, tokenizer, context, f" {word}"))
    assert results["lambada"]["metrics"]["perplexity"] == pytest.approx(math.exp(-np.mean(losses)), rel=1e-5)
    assert results["lambada"]["main_score"] == results["lambada"]["metrics"]["acc"]
    value = results["perplexity"]["main_score"]
    assert value == perplexity(model, tokenizer, CORPUS, batch_size=3)
    assert not results["perplexity"]["higher_is_better"]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) - 1 for text in CORPUS)
    assert results["perplexity"]["metrics"]["num_tokens"] == num_tokens
    num_bits = math.log2(value) * num_tokens
    num_bytes = sum(len(text.encode()) for text in CORPUS)  # <bos> is before all of them
    assert results["perplexity"]["metrics"]["bits_per_byte"] == pytest.approx(num_bits / num_bytes)
    json.dumps(results)


def test_bits_per_byte_counts_the_bytes_that_are_predicted(load, tmp_path):
    """A text of 300 tokens of which 256 are read; and a tokenizer that puts nothing first."""
    model, tokenizer = load()
    path = tmp_path / "text.txt"
    path.write_text("é" * 200)
    result = evaluate_generation(model, tokenizer, GenerationTask("text", "perplexity", path))
    assert (result["metrics"]["num_tokens"], result["truncated"]) == (255, 1)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(math.log2(result["main_score"]) * 255 / 256)


def test_prompts_that_do_not_fit_are_cut_and_counted(load, tmp_path):
    """Learned positions end at 256; some of the questions fit with five examples and others do not."""
    model, tokenizer = load("gpt_neo")
    task = write_mmlu(tmp_path, {"law": 2})
    with task.data.open("a") as file:
        file.write(f"law,{'long ' * 90},a,b,c,d,A\n")
    dev = task.dev.read_text()
    result = evaluate_generation(model, tokenizer, GenerationTask("MMLU", "mmlu", task.data, task.dev, num_fewshot=0))
    assert result["truncated"] == pytest.approx(1 / 3)
    assert evaluate_generation(model, tokenizer, task)["truncated"] == 1
    assert task.dev.read_text() == dev


def test_an_answer_longer_than_the_context_is_refused(load, tmp_path):
    model, tokenizer = load()
    rows = [{"question": "why?", "choices": ["x" * 300, "y"], "labels": ["A", "B"], "answer": "A"}]
    task = GenerationTask("ARC", "arc_easy", write_jsonl(tmp_path / "arc.jsonl", rows))
    with pytest.raises(ValueError, match=r"has \d+ tokens; the model takes 1 to 256"):
        evaluate_generation(model, tokenizer, task)


def test_options_of_a_question_share_one_forward_pass(load, tmp_path):
    model, tokenizer = load(max_position_embeddings=2048)
    num_rows = []
    model.register_forward_pre_hook(lambda module, args: num_rows.append(len(args[0])))
    result = evaluate_generation(model, tokenizer, write_mmlu(tmp_path, {"law": 6}), batch_size=4)
    assert result["num_samples"] == 6
    assert num_rows == [4, 2]  # each question once


# --------------------------------------------------------------------------------------------------------------------
# GEM models


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_a_frozen_model_has_its_bases_results_to_the_last_digit(make_model, load, tmp_path, architecture):
    gem = make_model(architecture, freeze_base=True, lora_rank=4)[0]
    base, tokenizer = load(architecture)
    before = {name: tensor.clone() for name, tensor in gem.state_dict().items()}
    for task in (write_mmlu(tmp_path, {"law": 3}), *write_others(tmp_path).values()):
        result = evaluate_generation(gem.model, gem.tokenizer, task, batch_size=4)
        assert result == evaluate_generation(base, tokenizer, task, batch_size=4)
    assert gem.tokenizer.pad_token is None
    after = gem.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_adapter_on_every_token_counts_and_stays_as_it_is(make_model, load, tmp_path):
    model = make_model()
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    base, tokenizer = load()
    task = write_others(tmp_path)["lambada"]
    inputs = torch.tensor([[0, 5, 6, 7]])
    before = model[0].model.eval()(inputs).logits
    result = evaluate_generation(model[0].model, model[0].tokenizer, task)
    assert torch.equal(model[0].model(inputs).logits, before)
    assert result["metrics"]["perplexity"] != evaluate_generation(base, tokenizer, task)["metrics"]["perplexity"]


def test_a_tokenizer_that_ends_texts_in_a_token_is_refused(load, tmp_path):
    model, tokenizer = load()
    tokenizer.backend_tokenizer.post_processor = generation_end(tokenizer)
    with pytest.raises(ValueError, match="ends every text in a token of its own"):
        evaluate_generation(model, tokenizer, write_others(tmp_path)["lambada"])


def generation_end(tokenizer):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])


# --------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_batches_are_halved_until_they_fit(error):
    tried = []

    def work(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > 3:
            raise error
        return "done"

    assert retry_smaller(work, 20) == "done"
    assert tried == [20, 10, 5, 2]


def test_what_does_not_fit_or_fails_otherwise_is_raised():
    def never(batch_size: int) -> None:
        raise torch.OutOfMemoryError(f"with {batch_size}")

    def broken(batch_size: int) -> None:
        raise RuntimeError(f"shape mismatch at {batch_size}")

    with pytest.raises(torch.OutOfMemoryError, match="with 1"):
        retry_smaller(never, 6)
    with pytest.raises(RuntimeError, match="shape mismatch at 6"):
        retry_smaller(broken, 6)


def test_a_task_survives_running_out_of_memory(load, tmp_path):
    model, tokenizer = load()
    tasks = write_others(tmp_path)
    expected = {name: evaluate_generation(model, tokenizer, task, batch_size=2) for name, task in tasks.items()}

    def refuse(module, args, kwargs):
        if len(args[0] if args else kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    for name, task in tasks.items():
        result = evaluate_generation(model, tokenizer, task, batch_size=8)
        assert result == expected[name]
        assert result["batch_size"] == 2


# --------------------------------------------------------------------------------------------------------------------
# Bad input


MMLU_HEAD = "subject,question,A,B,C,D,answer\n"
ARC = {"question": "q", "choices": ["a", "b"], "labels": ["A", "B"], "answer": "A"}
SWAG = {"activity_label": "x", "ctx": "y", "endings": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "mmlu",
            "subject,question,A,B,C,answer\nlaw,q,1,2,3,A\n",
            r"data.csv, line 2: no column D. Expected subject, ",
        ),
        ("mmlu", MMLU_HEAD + "law,q,1,2,3,4,A\nlaw,q,1,2,3,4,E\n", "line 3: column 'answer' is 'E', expected A, B, C"),
        ("mmlu", MMLU_HEAD + "law,q,1,2,3\n", "line 2: column 'D' is None, expected an option"),
        ("mmlu", MMLU_HEAD + ",q,1,2,3,4,A\n", "column 'subject' is '', expected text"),
        ("mmlu", MMLU_HEAD, "data.csv has no rows"),
        ("mmlu", "", "data.csv has no rows"),
        ("arc_easy", "{", r"data.jsonl, line 1: not JSON"),
        ("arc_easy", "[1]", r"line 1: expected a JSON object, not '\[1\]'"),
        ("arc_easy", json.dumps({**ARC, "answer": "C"}), r"column 'answer' is 'C', expected one of the labels \['A'"),
        ("arc_easy", json.dumps({**ARC, "choices": ["a", ""]}), "column 'choices' is .*, expected a list of two texts"),
        ("arc_easy", json.dumps({**ARC, "labels": ["A"]}), "column 'labels' is .*, expected one label for each choice"),
        (
            "hellaswag",
            json.dumps({**SWAG, "label": 2}),
            "column 'label' is 2, expected the number of an ending, 0 to 1",
        ),
        ("hellaswag", json.dumps({**SWAG, "label": "x"}), "column 'label' is 'x'"),
        ("hellaswag", json.dumps({**SWAG, "ctx": None}), r"column 'ctx' is None, expected text \(or ctx_a and ctx_b\)"),
        ("lambada", json.dumps({"text": "word"}), "column 'text' is 'word', expected two words or more"),
        ("lambada", json.dumps({"text": "two words "}), "no space at the end"),
        ("lambada", '\n{"text": "a b"}\n{"no": 1}', "line 3: no column text. Expected text, found no"),
        ("perplexity", "\n \n", "data.txt is empty. Expected one text a line"),
    ],
)
def test_bad_files_are_named_with_the_line_and_what_was_expected(tmp_path, kind, text, message):
    path = tmp_path / f"data.{ {'mmlu': 'csv', 'perplexity': 'txt'}.get(kind, 'jsonl') }"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_task(GenerationTask("task", kind, path, num_fewshot=None if kind == "perplexity" else 0))


def test_encodings_of_files(tmp_path):
    path = tmp_path / "data.jsonl"
    for kind in ("arc_easy", "perplexity"):
        task = GenerationTask("task", kind, path)
        path.write_bytes(("\ufeff" + json.dumps(ARC)).encode())
        check_task(task)
        path.write_bytes(json.dumps({**ARC, "question": "é"}, ensure_ascii=False).encode("latin-1"))
        with pytest.raises(ValueError, match=r"data.jsonl cannot be read: 'utf-8' codec"):
            check_task(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": ["mmlu"]}, r"unknown type \['mmlu'\]"),
        ({"type": "gsm8k"}, "task: unknown type 'gsm8k'. Choose one of mmlu, arc_easy, hellaswag, lambada, perplexity"),
        ({"type": "mmlu", "limit": 0}, "task: limit is 0, expected a whole number, 1 or more"),
        ({"type": "mmlu", "limit": True}, "task: limit is True"),
        ({"type": "mmlu", "num_fewshot": -1}, "num_fewshot is -1, expected a whole number, 0 or more"),
        ({"type": "mmlu", "dev": Path("dev.csv")}, "dev is given, but data is not"),
        ({"type": "perplexity"}, "perplexity needs data, a text file"),
        ({"type": "perplexity", "num_fewshot": 1}, "perplexity takes neither dev nor num_fewshot"),
        ({"type": "arc_easy", "data": Path("nowhere.jsonl")}, "nowhere.jsonl cannot be read"),
    ],
)
def test_bad_tasks_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        check_task(GenerationTask("task", **options))


def test_subjects_without_enough_examples_are_refused(tmp_path):
    task = write_mmlu(tmp_path, {"law": 1, "history": 1}, num_examples=4)
    with pytest.raises(ValueError, match=r"dev.csv: 4 examples of law, expected 5 \(num_fewshot\) or more"):
        check_task(task)
    with pytest.raises(ValueError, match="no dev file for the 5 examples"):
        check_task(GenerationTask("MMLU", "mmlu", task.data))
    check_task(GenerationTask("MMLU", "mmlu", task.data, task.dev, num_fewshot=4))


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path):
    tasks = write_others(tmp_path)
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gem-st\[eval\]'"):
        check_task(tasks["arc_easy"])
    check_task(tasks["perplexity"])


# --------------------------------------------------------------------------------------------------------------------
# lm-eval's own data


def test_without_network_the_local_way_is_named(monkeypatch, load):
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=r"could not load its task 'mmlu'.*no route to host.*name local files.*data:"):
        evaluate_generation(*load(), GenerationTask("MMLU", "mmlu"))


def test_tasks_of_the_hub_and_of_a_file_give_the_same(monkeypatch, load, tmp_path):
    model, tokenizer = load(max_position_embeddings=2048)
    local = write_mmlu(tmp_path, {"anatomy": 3, "virology": 2})
    documents = {name: generation._read(path, KINDS["mmlu"].columns, KINDS["mmlu"].make)
                 for name, path in (("test", local.data), ("dev", local.dev))}  # fmt: skip

    def load_dataset(path: str, name: str) -> datasets.DatasetDict:
        assert path == "cais/mmlu"
        subject = name if name == "anatomy" else "virology"
        return datasets.DatasetDict(
            {key: datasets.Dataset.from_list([row for row in rows if row["subject"] == subject])
             for key, rows in documents.items()}
        )  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = evaluate_generation(model, tokenizer, GenerationTask("MMLU", "mmlu"), batch_size=1)
    expected = evaluate_generation(model, tokenizer, local, batch_size=1)
    assert len(result["subjects"]) == 57
    assert result["num_fewshot"] == 5
    assert result["subjects"]["anatomy"] == expected["subjects"]["anatomy"]
    assert result["correct"]["virology"] == expected["correct"]["virology"]


@pytest.mark.skipif(not (SHARED / "data/knowledge").is_dir(), reason="the shared files are not here")
def test_the_shared_files_are_read():
    folder = SHARED / "data/knowledge"
    mmlu = GenerationTask("MMLU", "mmlu", folder / "mmlu-test.csv", folder / "mmlu-dev.csv")
    documents, examples = generation._read_documents(mmlu)
    assert (len(documents), len(examples)) == (14042, 285)
    for kind, name in (("arc_easy", "arc_easy-test"), ("hellaswag", "hellaswag_sub"), ("lambada", "lambada_test")):
        check_task(GenerationTask(kind, kind, folder / f"{name}.jsonl"))
