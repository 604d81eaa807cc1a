"""`examples/rag_server`: a question's way through embeddings, LanceDB and chat, and the page in a real browser."""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ..conftest import CORPUS, ROOT
from .served import listening, send

pytest.importorskip("lancedb", reason="the example's table needs it: pip install lancedb")

QUESTION = "Where is the old clock?"
JSON = {"content-type": "application/json"}
NOBODY = "http://127.0.0.1:9/v1"
MARKUP = "<img src=x onerror='window.hit=1'><script>window.hit=1</script> & <b>bold</b>"


def load(name: str) -> ModuleType:
    """A script of the example, as a module."""
    spec = importlib.util.spec_from_file_location(f"rag_{name}", ROOT / "examples" / "rag_server" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rag() -> ModuleType:
    return load("app")


@pytest.fixture
def settings(rag, frozen, tmp_path) -> Any:
    """Settings of an app that knows all of the corpus but its last sentence."""
    passages = tmp_path / "passages.jsonl"
    passages.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS[:-1]))
    server = f"http://127.0.0.1:{frozen.port}/v1"
    return rag.Settings(server=server, passages=passages, db=tmp_path / "db", shown=3, read=2, max_tokens=8)


def post(port: int, path: str, body: Any) -> list[dict[str, Any]]:
    """Events that the app answers with."""
    reply = send(port, "POST", f"/api/{path}", body, JSON)
    assert reply.status == 200, reply
    return [json.loads(line) for line in reply.body.splitlines()]


@contextmanager
def asking(rag: ModuleType, settings: Any) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """A running app, as a function from a question to events."""
    with listening(rag.create_app(settings)) as port:
        yield lambda question: post(port, "ask", {"question": question})


def nearest(model: Any, question: str, passages: list[str]) -> list[tuple[str, float]]:
    """Passages and their cosines, by the model itself."""
    cosines = model.encode_document(passages) @ model.encode_query(question)
    return [(passages[index], float(cosines[index])) for index in np.argsort(-cosines)]


def answer_of(rag: ModuleType, served: Any, question: str, passages: list[str]) -> str:
    """What the server answers from passages."""
    prompt = rag.PROMPT.format(passages="\n\n".join(passages), question=question)
    messages = [{"role": "user", "content": prompt}]
    reply = served.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    return reply.choices[0].message.content


# ---- routes


def test_passages_come_first_then_the_answer_token_by_token_then_the_timings(rag, frozen, settings):
    with asking(rag, settings) as ask:
        events = [event for event in ask(QUESTION) if event["type"] != "indexing"]
    found, *tokens, done = events
    expected = nearest(frozen.model, QUESTION, CORPUS[:-1])[:3]
    assert [passage["text"] for passage in found["passages"]] == [text for text, _ in expected]
    cosines = [passage["similarity"] for passage in found["passages"]]
    np.testing.assert_allclose(cosines, [cosine for _, cosine in expected], atol=1e-5)
    assert [passage["read"] for passage in found["passages"]] == [True, True, False]
    assert {event["type"] for event in tokens} == {"token"}
    assert len(tokens) > 2
    answer = "".join(event["text"] for event in tokens)
    assert answer == answer_of(rag, frozen, QUESTION, [text for text, _ in expected[:2]])
    timings = done["timings"]
    assert list(timings) == ["embedding", "search", "first token", "total"]
    assert 0 < timings["embedding"] + timings["search"] + timings["first token"] <= timings["total"]
    assert done["finish_reason"] == "length"


def test_the_table_is_kept_and_follows_the_file(rag, settings):
    with listening(rag.create_app(settings)) as port:
        assert post(port, "passages", {"text": f"{CORPUS[-1]}\n\n{CORPUS[0]}"})[-1]["added"] == 1
        assert post(port, "passages", {"text": CORPUS[-1]})[-1]["added"] == 0
        assert send(port, "GET", "/api/status").body["passages"] == len(CORPUS)
    with asking(rag, settings) as ask:
        assert "indexing" not in [event["type"] for event in ask(QUESTION)]
    settings.passages.write_text(json.dumps({"text": CORPUS[0]}) + "\n" + json.dumps({"text": "New bread."}))
    settings.shown = 9
    with asking(rag, settings) as ask:
        (found,) = (event for event in ask(QUESTION) if event["type"] == "passages")
    texts = {passage["text"]: passage["source"] for passage in found["passages"]}
    assert texts == {CORPUS[0]: str(settings.passages), "New bread.": str(settings.passages), CORPUS[-1]: "pasted"}


def test_a_passage_that_is_too_long_for_the_model_is_named_and_nothing_is_kept(rag, settings):
    long = "The boat. " * 400
    lines = settings.passages.read_text()
    settings.passages.write_text(lines + json.dumps({"text": long}))
    with asking(rag, settings) as ask:
        refusal = ask(QUESTION)[-1]
        assert "That is too long for the model" in refusal["message"]
        assert f"It is the passage: {long[:80]}..." in refusal["message"]
        settings.passages.write_text(lines)
        assert ask(QUESTION)[-1]["type"] == "done"


def test_vectors_of_another_model_are_refused_or_made_again(rag, frozen, full, settings):
    """Of the same name and dimension; the server may change while the app runs."""
    with asking(rag, settings) as ask:
        ask(QUESTION)
        settings.server = f"http://127.0.0.1:{full.port}/v1"
    with asking(rag, settings) as ask:
        (refusal,) = ask(QUESTION)
    size = frozen.model.get_embedding_dimension()
    assert f"were embedded by another model, tiny ({size} dimensions); the server has tiny" in refusal["message"]
    assert "--rebuild" in refusal["message"]
    settings.rebuild = True
    with asking(rag, settings) as ask:
        (found,) = (event for event in ask(QUESTION) if event["type"] == "passages")
    expected = nearest(full.model, QUESTION, CORPUS[:-1])[0]
    assert found["passages"][0]["text"] == expected[0]
    assert found["passages"][0]["similarity"] == pytest.approx(expected[1], abs=1e-5)


@pytest.fixture
def broken(frozen, monkeypatch) -> Callable[[str], None]:
    """Function that makes the server answer with an error."""

    def make(how: str) -> None:
        if how == "loading":
            monkeypatch.setattr(frozen.server, "_engine", None)
        elif how == "full":
            monkeypatch.setattr(frozen.server.options, "max_queue", 0)
        elif how == "key":
            monkeypatch.setattr(frozen.server.options, "api_key", "another")

    return make


PROBLEMS = {
    "loading": "The model is still being loaded.",
    "full": "The server has as many requests waiting as it takes.",
    "key": "Start this app with GEM_ST_API_KEY set to the key of the server.",
    "long": "That is too long for the model: ",
    "gone": f"No server answers at {NOBODY}. Start it: gem-st serve",
}


@pytest.mark.parametrize("how", PROBLEMS)
def test_errors_of_the_server_are_told_in_plain_words(rag, settings, broken, how):
    if how == "gone":
        settings.server = NOBODY
    with asking(rag, settings) as ask:
        broken(how)
        question = QUESTION if how != "long" else "qz" * 300
        assert PROBLEMS[how] in ask(question)[-1]["message"]


def test_what_breaks_while_an_answer_is_written_is_told(rag, settings, frozen, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    async def embed(self: Any, model: str, texts: list[str], kind: str) -> np.ndarray:
        return np.eye(len(texts), 8, dtype=np.float32)

    with asking(rag, settings) as ask:
        monkeypatch.setattr(frozen.server.engine.gem.model, "forward", fail)
        monkeypatch.setattr(rag.Rag, "_embed", embed)
        events = ask(QUESTION)
    assert [event["type"] for event in events][-2:] == ["passages", "error"]
    assert events[-1]["message"].startswith("The server ")
    assert "secret" not in events[-1]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        ({"question": "a"}, {"content-type": "text/plain"}, "Send JSON."),
        (b"{", JSON, "Send {"),
        ([], JSON, "Send {"),
        ({"question": "\ud800"}, JSON, "Send {"),
        ({"question": " "}, JSON, "nothing written"),
        ({"question": "a" * 1001}, JSON, "1001 characters long, and there is room for 1000"),
        ({"question": "a" * 300_000}, JSON, "more than 250000 bytes"),
    ],
)
def test_what_the_app_does_not_take_is_refused(rag, settings, body, headers, message):
    with listening(rag.create_app(settings)) as port:
        reply = send(port, "POST", "/api/ask", body, headers)
    assert reply.status == 400
    assert message in reply.body["error"]


def test_other_sites_cannot_call_the_app_by_another_name(rag, settings):
    with listening(rag.create_app(settings)) as port:
        assert send(port, "GET", "/", headers={"Host": "evil.example"}).status == 400
        shown = send(port, "GET", "/", headers={"Host": f"localhost:{port}"})
        again = send(port, "GET", "/")
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "{{nonce}}" not in shown.body
    assert policy != again.headers["content-security-policy"]


def test_who_goes_away_ends_the_answer_at_the_server(rag, frozen, settings):
    settings.max_tokens = 100
    with listening(rag.create_app(settings)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/api/ask", json.dumps({"question": QUESTION}), JSON)
        response = connection.getresponse()
        while b'"token"' not in response.readline():
            pass
        response.close()
        connection.close()
        frozen.wait_for_empty_queue()


def test_texts_are_cut_at_paragraphs_sentences_and_words(rag, monkeypatch):
    monkeypatch.setattr(rag, "PIECE", 10)
    assert rag.split_text("One. Two.\nSix.\n\n \n\nA b c d e f g. Hi!") == [
        "One. Two.",
        "Six.",
        "A b c d e",
        "f g. Hi!",
    ]
    assert rag.split_text("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]
    assert rag.split_text(" \n\n ") == []


def test_files_of_passages_are_read_or_refused(rag, tmp_path, monkeypatch):
    assert len(rag.read_passages(rag.PASSAGES)) == 160
    (tmp_path / "plain.txt").write_text("One.\n\nTwo.\n\nOne.")
    assert rag.read_passages(tmp_path / "plain.txt") == ["One.", "Two."]
    for name, text in (("a.jsonl", '{"title": "x"}'), ("b.jsonl", "no json"), ("c.jsonl", "5")):
        (tmp_path / name).write_text(text)
        with pytest.raises(rag.Problem, match=r"cannot be read: .* Give JSON lines with a field text"):
            rag.read_passages(tmp_path / name)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(rag.Problem, match="holds no passages"):
        rag.read_passages(tmp_path / "empty.txt")
    monkeypatch.setattr(rag, "MAX_PASSAGES", 1)
    with pytest.raises(rag.Problem, match="holds 2 passages, and there is room for 1"):
        rag.read_passages(tmp_path / "plain.txt")


# ---- the page


class Page:
    """The page in a browser.

    Args:
        driver: The browser.
        port: Where the page is.
    """

    def __init__(self, driver: Any, port: int) -> None:
        self.driver = driver
        driver.get(f"http://127.0.0.1:{port}/")

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent)"
        return self.driver.execute_script(script, selector)

    def fill(self, field: str, text: str, button: str) -> None:
        """Write into a field as a person does, and press a button."""
        element = self.driver.find_element("css selector", field)
        element.clear()
        element.send_keys(text)
        self.driver.find_element("css selector", button).click()

    def ask(self, question: str) -> None:
        """Ask, and wait until the answer is there or cannot be had."""
        self.fill("#question", question, "#go")
        self.wait(lambda: self.text("#go") == "Ask" and (self.text("#timings") or self.text("#error")))

    def wait(self, condition: Callable[[], Any]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30, 0.05).until(lambda _: condition())


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    pytest.importorskip("selenium", reason="drives the browser: pip install selenium")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("There is no Chromium: apt-get install chromium chromium-driver")
    from selenium.common.exceptions import SessionNotCreatedException

    with ExitStack() as stack:
        try:
            driver = stack.enter_context(load("screenshot").browser(tmp_path_factory.mktemp("chromium")))
        except SessionNotCreatedException as error:
            pytest.skip(f"Chromium does not start here: {error.msg}")
        yield driver


@pytest.fixture
def open_page(rag, settings, browser) -> Iterator[Callable[[], Page]]:
    """Function that starts an app and opens its page."""
    with ExitStack() as stack:
        yield lambda: Page(browser, stack.enter_context(listening(rag.create_app(settings))))


def test_a_person_asks_and_sees_passages_similarities_answer_and_timings(rag, frozen, open_page):
    page = open_page()
    page.ask(QUESTION)
    expected = nearest(frozen.model, QUESTION, CORPUS[:-1])[:3]
    assert page.texts("#passages p") == [text for text, _ in expected]
    shown = [float(value) for value in page.texts("#passages .similarity")]
    np.testing.assert_allclose(shown, [cosine for _, cosine in expected], atol=6e-4)
    assert page.texts("#passages .mark") == ["answered from"] * 2
    assert page.text("#answer") == answer_of(rag, frozen, QUESTION, [text for text, _ in expected[:2]])
    assert page.texts("#timings dt") == ["embedding", "search", "first token", "total"]
    assert page.text("#status") == f"7 passages · tiny · {frozen.model.get_embedding_dimension()} dimensions"
    widths = page.driver.execute_script(
        "return [...document.querySelectorAll('.bar i')].map((bar) => parseFloat(bar.style.width))"
    )
    np.testing.assert_allclose(widths, [100 * max(0, cosine) for _, cosine in expected], atol=0.1)


def test_every_field_has_a_name_and_a_phone_shows_all_of_it(open_page):
    page = open_page()
    page.driver.set_window_size(500, 900)
    try:
        page.ask(QUESTION)
        for selector in ("#question", "#go", "#text", "#keep", "#result", "#timings"):
            page.driver.execute_script("document.querySelector('details').open = true")
            assert page.driver.find_element("css selector", selector).accessible_name, selector
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.driver.execute_script(script) <= 0
    finally:
        page.driver.set_window_size(900, 900)


def test_markup_in_passages_and_answers_stays_text(rag, open_page, monkeypatch):
    async def answer(*_: Any) -> Any:
        yield MARKUP, "stop"

    monkeypatch.setattr(rag.Rag, "_answer", answer)
    page = open_page()
    page.driver.execute_script("document.querySelector('details').open = true")
    page.fill("#text", MARKUP, "#keep")
    page.wait(lambda: page.text("#added") == "Added 1 passages.")
    page.ask(MARKUP)
    assert page.text("#passages p") == MARKUP
    assert page.text("#answer") == MARKUP
    assert "your text" in page.text("#passages li")
    assert page.driver.execute_script("return [window.hit, document.images.length, document.scripts.length]") == [
        None,
        0,
        1,
    ]
    assert page.driver.get_log("browser") == []  # nothing for its policy to stop


def test_the_page_says_what_is_wrong_and_takes_the_next_question(open_page, settings, broken, frozen, monkeypatch):
    page = open_page()
    for how in ("loading", "full", "key"):
        broken(how)
        page.ask(QUESTION)
        monkeypatch.undo()
        assert PROBLEMS[how] in page.text("#error")
        assert not page.driver.find_element("css selector", "#result").is_displayed()
    page.ask(QUESTION)
    assert page.text("#error") == ""
    assert page.text("#answer")


def test_an_app_that_is_gone_is_told(rag, settings, browser):
    with listening(rag.create_app(settings)) as port:
        page = Page(browser, port)
        page.wait(lambda: page.text("#status"))
    page.ask(QUESTION)
    assert page.text("#error") == "This page's app does not answer. Start examples/rag_server/app.py."


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere():
    html = (ROOT / "examples" / "rag_server" / "page.html").read_text(encoding="utf-8")
    for word in ("http:", "https:", "//cdn", "@import", "innerHTML", "insertAdjacentHTML", "document.write"):
        assert word not in html
