"""Clients of OpenAI's API against the server, by the lines of docs/integrations.md."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import openai
import pytest

from ..conftest import CORPUS
from ..snippets import run_snippet

# What clients warn of is between them and their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")

TEXTS = [CORPUS[0], "Two lines\nof one text, which some clients make one."]
QUESTION = "Where is the train?"


@pytest.fixture
def page(frozen, monkeypatch):
    """Function that runs the lines of a client on a server of prompts and K = 2, and gives the names they define."""

    def run(heading: str) -> dict[str, Any]:
        replaced = {"127.0.0.1:8000": f"127.0.0.1:{frozen.port}", 'gem"': 'tiny"'}
        return run_snippet("integrations.md", heading, replaced, model=frozen.model, texts=TEXTS)

    monkeypatch.setitem(frozen.model.prompts, "document", "Text: ")
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return run


def check(frozen, documents, query) -> None:
    """Documents and query have their own prompts before them, and newlines are where they were."""
    vectors = [frozen.model.encode(text) for text in (TEXTS[1], "Text: " + TEXTS[1], TEXTS[1].replace("\n", " "))]
    assert min(np.abs(vectors[i] - vectors[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    np.testing.assert_allclose(documents, frozen.model.encode_document(TEXTS), atol=1e-4)
    np.testing.assert_allclose(query, frozen.model.encode_query(QUESTION), atol=1e-4)


def answer_of(frozen, num_new: int = 20, **options: Any) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    done = frozen.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=num_new, **options)
    return done.choices[0].message.content


def test_openai(page, frozen):
    names = page("openai")
    check(frozen, [item.embedding for item in names["document"].data], names["query"].data[0].embedding)
    assert names["answer"].choices[0].message.content.startswith(answer_of(frozen))


def test_langchain(page, frozen):
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    names = page("LangChain")
    check(frozen, names["documents"], names["query"])

    async def again():
        embeddings, chat = names["embeddings"], names["chat"]
        vectors = await embeddings.aembed_documents(TEXTS), await embeddings.aembed_query(QUESTION)
        return vectors, (await chat.ainvoke(QUESTION)).content

    vectors, answer = asyncio.run(again())
    check(frozen, *vectors)
    assert answer == names["answer"]
    assert names["answer"] == answer_of(frozen)
    assert names["answer"].startswith(names["streamed"].rstrip("\ufffd"))
    assert len(names["streamed"]) > 4


def test_langchain_without_prompts(frozen):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    server = {"model": "tiny", "base_url": f"http://127.0.0.1:{frozen.port}/v1", "api_key": "any"}
    embeddings = langchain.OpenAIEmbeddings(**server, check_embedding_ctx_length=False, chunk_size=3)
    np.testing.assert_allclose(embeddings.embed_documents(CORPUS), frozen.model.encode(CORPUS), atol=1e-4)
    np.testing.assert_allclose(embeddings.embed_query(QUESTION), frozen.model.encode(QUESTION), atol=1e-4)


def test_langchain_as_it_comes_sends_ids_of_another_tokenizer_and_is_refused(full, frozen, monkeypatch):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    server = {"model": "tiny", "api_key": "any"}
    embeddings = langchain.OpenAIEmbeddings(**server, base_url=f"http://127.0.0.1:{full.port}/v1")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.embed_query("Train")
    # Where ids were allowed nobody can tell whose they are.
    embeddings = langchain.OpenAIEmbeddings(**server, base_url=f"http://127.0.0.1:{frozen.port}/v1")
    wrong = np.array(embeddings.embed_query("Train"))
    assert np.abs(wrong - frozen.model.encode("Train")).max() > 1e-3


def test_tools_of_langchain_reach_the_template(make_served_model):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from .served import serving

    def weather(city: str) -> str:
        """How warm it is."""
        return city

    model = make_served_model(freeze_base=True)
    model.tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}: {{ tool.function.description }}]{% endfor %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with serving(model) as served:
        chat = langchain.ChatOpenAI(
            model="tiny", base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_tokens=1, max_retries=0
        )
        done = chat.bind_tools([weather]).invoke("Rome?")
        ids = model.tokenizer("[weather: How warm it is.]Rome?", add_special_tokens=False)["input_ids"]
        assert done.usage_metadata["input_tokens"] == len(ids)
        with pytest.raises(Exception, match="tool_choice"):
            chat.bind_tools([weather], tool_choice="any").invoke("Rome?")
        with pytest.raises(Exception, match="response_format"):
            chat.with_structured_output(
                {"title": "a", "type": "object", "properties": {}}, method="json_schema"
            ).invoke("Rome?")


def test_haystack(page, frozen, monkeypatch, tmp_path):
    pytest.importorskip(
        "haystack_integrations.components.embedders.sentence_transformers", reason="run by `make test-clients`"
    )
    frozen.model.save_pretrained(str(tmp_path / "gem-smollm2"))
    monkeypatch.chdir(tmp_path)
    names = page("Haystack")
    check(frozen, [document.embedding for document in names["documents"]], names["query"])
    check(frozen, [document.embedding for document in names["documents"]], names["query_by_name"])
    assert names["answer"] == answer_of(frozen)


def test_litellm(page, frozen):
    pytest.importorskip("litellm", reason="run by `make test-clients`")
    names = page("LiteLLM")
    check(frozen, [item["embedding"] for item in names["documents"].data], names["query"].data[0]["embedding"])
    assert names["answer"].choices[0].message.content == answer_of(frozen)
