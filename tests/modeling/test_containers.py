"""Containers of texts: whatever `encode` takes for a batch is one everywhere, and nothing else is anywhere."""

from __future__ import annotations

from collections import deque

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

TEXTS = ["It rained", "Once upon a time there was", "Tom"]
MESSAGES = [[{"role": "user", "content": text}] for text in TEXTS]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
GREEDY = {"max_new_tokens": 3, "do_sample": False}
DATASET = Dataset.from_dict({"text": TEXTS, "messages": MESSAGES})
TAKEN = {
    "tuple": tuple(TEXTS),
    "array of str": np.array(TEXTS),
    "array of objects": np.array(TEXTS, dtype=object),
    "array of np.str_": np.array([np.str_(text) for text in TEXTS], dtype=object),
    "column": DATASET["text"],
    "column in numpy format": DATASET.with_format("numpy")["text"],
    "column of a batch": DATASET[:]["text"],
}
REFUSED = {
    "series": pd.Series(TEXTS),
    "series with another index": pd.Series(TEXTS, index=[5, 0, 9]),
    "series of Arrow": pd.Series(TEXTS, dtype="string[pyarrow]"),
    "index": pd.Index(TEXTS),
    "Arrow array": pa.array(TEXTS),
    "chunked Arrow array": pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "deque": deque(TEXTS),
    "dict": dict.fromkeys(TEXTS),
    "set": set(TEXTS),
    "generator": (text for text in TEXTS),
    "array without dimensions": np.array(TEXTS[0]),
    "missing values": pd.Series([TEXTS[0], None]),
    "bytes": b"It rained",
}
CHATS = {
    "tuple": tuple(MESSAGES),
    "tuples": [tuple(messages) for messages in MESSAGES],
    "column": DATASET["messages"],
    "array": np.array(MESSAGES, dtype=object),
}


@pytest.mark.parametrize("container", TAKEN.values(), ids=TAKEN)
def test_what_encode_takes_is_taken_everywhere(make_model, container):
    model = make_model()
    gem = model[0]
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(model.encode(container, convert_to_tensor=True), vectors)
    cache = gem.prefill(container)
    torch.testing.assert_close(gem.embed(cache), vectors, atol=1e-5, rtol=1e-5)
    assert gem.compress(container).lengths.tolist() == cache.lengths.tolist()
    assert gem.generate(container, **GREEDY) == gem.generate(TEXTS, **GREEDY)
    more = gem.extend(cache, container)
    assert more.input_ids.tolist() == gem.extend(cache, TEXTS).input_ids.tolist()


@pytest.mark.parametrize("container", REFUSED.values(), ids=REFUSED)
def test_what_encode_does_not_take_is_taken_nowhere(make_model, container):
    model = make_model()
    gem = model[0]
    cache = gem.prefill(TEXTS)
    for read in (model.encode, gem.prefill, gem.compress, gem.generate, lambda texts: gem.extend(cache, texts)):
        with pytest.raises(ValueError, match=r"many texts are a list, tuple, numpy array or column of `datasets`"):
            read(container)


@pytest.mark.parametrize("container", CHATS.values(), ids=CHATS)
def test_containers_of_conversations(make_model, container):
    gem = make_model(chat_template=CHAT)[0]
    assert gem.generate(container, **GREEDY) == gem.generate(MESSAGES, **GREEDY)
    assert gem.prefill(container).input_ids.tolist() == gem.prefill(MESSAGES).input_ids.tolist()
    assert gem.generate(tuple(MESSAGES[0]), **GREEDY) == gem.generate(MESSAGES[0], **GREEDY)


def test_texts_and_messages_in_one_list(make_model):
    with pytest.raises(ValueError, match="all texts or all messages"):
        make_model(chat_template=CHAT)[0].generate([TEXTS[0], MESSAGES[0]])
