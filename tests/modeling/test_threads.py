"""Several threads with one model: embedding, continuing, reading and compressing."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ..conftest import CORPUS

TEXTS = [*CORPUS[:3], CORPUS[0] * 3]
MODES = {
    "full": {},
    "full, K = 2": {"num_gem_tokens": 2},
    "frozen": {"freeze_base": True, "lora_kwargs": {"lora_dropout": 0.9}},
    "frozen, K = 2": {"freeze_base": True, "num_gem_tokens": 2},
}


@pytest.fixture
def eager_threads():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def calls_of(model):
    gem = model[0]
    cache = gem.prefill(TEXTS)
    return {
        "encode": lambda: model.encode(TEXTS, batch_size=2),
        "generate": lambda: gem.generate(TEXTS, max_new_tokens=4, do_sample=False),
        "embed": lambda: gem.embed(cache).numpy(),
        "prefill": lambda: gem.embed(gem.prefill(TEXTS, batch_size=2)).numpy(),
        "extend": lambda: gem.embed(gem.extend(cache, " and more")).numpy(),
        "compress": lambda: gem.compress(TEXTS).layers[0][0].numpy(),
        "continue": lambda: gem.generate(cache=cache, max_new_tokens=4, do_sample=False),
        "answers": lambda: gem.reconstruct(gem.compress(TEXTS)),
    }


def is_close(found: object, expected: object) -> bool:
    if isinstance(expected, np.ndarray):
        return bool(np.allclose(found, expected, atol=1e-5))
    return found == expected


@pytest.mark.parametrize("mode", MODES)
def test_each_gets_what_it_would_get_alone(make_model, eager_threads, mode):
    model = make_model(**MODES[mode])
    calls = calls_of(model)
    expected = {name: call() for name, call in calls.items()}
    model.train()  # as a trainer leaves it
    start = threading.Barrier(len(calls))

    def repeat(name: str) -> list[str]:
        start.wait()
        return [name for _ in range(8) if not is_close(calls[name](), expected[name])]

    with ThreadPoolExecutor(len(calls)) as pool:
        assert [name for wrong in pool.map(repeat, calls) for name in wrong] == []
    assert not model[0].training  # `encode` asks for evaluation mode, and nobody takes it back


def test_the_mode_that_was_found_comes_back(make_model):
    gem = make_model(freeze_base=True)[0].train()
    modes = [part.training for part in gem.modules()]
    assert any(modes)
    cache, inside = gem.prefill(["a text"]), threading.Semaphore(0)
    leave = {"first": threading.Event(), "second": threading.Event()}

    def stay_long(*args: object) -> torch.Tensor:
        inside.release()
        leave[threading.current_thread().name].wait(60)
        return torch.zeros(1, 32)

    gem.embedder.embed_cache = stay_long
    threads = [threading.Thread(target=gem.embed, args=[cache], name=name) for name in leave]
    for thread in threads:
        thread.start()
        assert inside.acquire(timeout=60)
    for name, thread in zip(leave, threads, strict=True):
        assert not any(part.training for part in gem.modules())
        leave[name].set()
        thread.join()
    assert [part.training for part in gem.modules()] == modes
