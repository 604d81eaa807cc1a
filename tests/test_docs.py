"""README and examples run as they stand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import pytest

from .conftest import BASE_8M, ROOT
from .hub.hub_server import HubServer
from .modeling.test_gem_generator import CHAT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def run_python(python, tmp_path) -> Callable[..., str]:
    """Function that runs a script in the test's folder and gives what it prints."""

    def run(*args: object) -> str:
        env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
        done = python.run(*args, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_snippets_of_the_readme_run_as_they_stand(make_base, tmp_path, python):
    """In a clone, with a small model under the name of the large one on a server of the Hub's protocol."""
    files = make_base(chat_template=CHAT).iterdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "readme.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)))
    with HubServer({}, orgs={}) as server:
        server.seed("HuggingFaceTB/SmolLM2-135M-Instruct", {path.name: path.read_bytes() for path in files})
        done = python.run("readme.py", env=server.env(tmp_path / "home", token=None), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "gem-smollm2" / "gem_st.py").exists()


def test_the_snippets_of_the_frozen_base_run(make_base, tmp_path, run_python):
    text = (ROOT / "docs" / "frozen_base.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    base = str(make_base(num_reserved=4))
    (tmp_path / "snippets.py").write_text("\n".join(blocks).replace("meta-llama/Llama-3.2-1B", base))
    run_python("snippets.py")
    assert (tmp_path / "row.safetensors").exists()


def test_the_commands_and_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`|BASE=\S+ )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
    for path in re.findall(r"\]\(((?:docs|examples|benchmarks|model_cards)[^)#]*)\)", README):
        assert (ROOT / path).exists(), path


def test_the_tests_that_docs_name_exist():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for document in ("distributed.md", "hub.md", "serving.md"):
        text = (ROOT / "docs" / document).read_text(encoding="utf-8")
        names = set(re.findall(r"`(test_\w+)`", text))
        assert names
        for name in names:
            assert any(f"def {name}(" in source for source in sources.values()), name


def test_every_client_with_python_lines_has_a_test_that_runs_them():
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    headings = [section.splitlines()[0] for section in sections if "```python" in section]
    assert len(headings) == 11
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_clients.py", "serving/test_clients.py"))
    assert [heading for heading in headings if f'page("{heading}"' not in tests] == []


def test_the_matrix_of_the_readme_is_that_of_the_docstring():
    from gem_st import gem_attention_mask

    matrix = re.search(r"a b G H c d\n.*d \. \. x x x x", README, flags=re.DOTALL).group()
    drawn = re.search(r"a b G H c d\n.*d \. \. x x x x", gem_attention_mask.__doc__, flags=re.DOTALL).group()
    assert [line.split("      ")[0].strip() for line in matrix.splitlines()] == [
        line.strip() for line in drawn.splitlines()
    ]


@pytest.mark.parametrize(
    "name", ["encode", "train_self_supervised", "train_supervised", "see_the_mask", "rag_one_model", "search_corpus"]
)
def test_examples_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 80


def test_see_the_mask(tmp_path, run_python):
    output = run_python(ROOT / "examples/see_the_mask.py", "--base", BASE_8M, "--num-gem-tokens", 2)
    lines = [line.split() for line in output.splitlines()]
    assert [line[-1] for line in lines[1:]].count("x") == 1
    assert "GEM 2" in output


@pytest.mark.slow
def test_training_examples_and_encode(tmp_path, run_python):
    examples = ROOT / "examples"
    run_python(
        examples / "train_self_supervised.py",
        *("--base", BASE_8M, "--texts", examples / "data/train.txt", "--output", "self"),
        *("--steps", 2, "--batch-size", 8),
    )
    run_python(
        examples / "train_supervised.py",
        "--base",
        BASE_8M,
        "--output",
        "pairs",
        "--steps",
        2,
        "--batch-size",
        8,
    )
    for model in ("self", "pairs"):
        assert "How do I keep bread fresh?" in run_python(examples / "encode.py", tmp_path / model)
    output = run_python(examples / "rag_one_model.py", tmp_path / "self", "--passages", 8)
    assert re.search(r"answering: [\d.]+ times as fast as reading the document again, same answers", output)


@pytest.mark.slow
def test_a_base_from_a_folder_of_text_writes_text_for_itself(tmp_path, run_python):
    (tmp_path / "texts").mkdir()
    passages = (ROOT / "examples/data/passages.jsonl").read_text().splitlines()
    (tmp_path / "texts" / "a.txt").write_text("\n".join(json.loads(line)["text"] for line in passages))
    run_python(
        ROOT / "examples/make_base.py",
        *("--texts", "texts", "--output", "base", "--steps", 2, "--batch-size", 2),
        *("--length", 64, "--vocab-size", 600, "--width", 64, "--layers", 2),
    )
    from gem_st import GemTransformer

    assert isinstance(GemTransformer(str(tmp_path / "base")).generate("The", max_new_tokens=3), str)
    run_python(
        ROOT / "examples/generate_text.py",
        *("--base", BASE_8M, "--num", 3, "--batch-size", 4, "--output", "made.txt"),
    )
    assert len((tmp_path / "made.txt").read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_demo_runs_to_its_end_without_a_network(tmp_path, run_python, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("GEM_ST_MODELS", str(tmp_path / "models"))
    output = run_python(ROOT / "examples/demo.py", "--steps", 4, "--batch-size", 8, "--output", "out")
    assert "cannot be downloaded" in output
    assert "The small model of this repository is trained instead." in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["base"] == "base-8m"
    base, echo, full, frozen = results["scores"].values()
    assert set(base) == set(echo) == set(full) == set(frozen)
    assert [answer["tokens_not_read_again"] > 20 for answer in results["answers"]] == [True] * 3
    assert len(base) == 3
    perplexity = "perplexity of held-out text"
    assert frozen[perplexity] == base[perplexity] != full[perplexity]
    assert "writes the same paragraph" in output
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert "(2, 256)" in output
    assert "The old man opened the door and" in output
