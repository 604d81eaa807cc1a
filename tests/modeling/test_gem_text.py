"""TextCodec: its ids are those of the tokenizer itself, whoever else uses that, which stays as it is."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gem_st.modeling.gem_own_tokenizer import copy_tokenizer
from gem_st.modeling.gem_text import TextCodec

from ..conftest import CORPUS, build_tokenizer

WORDS = ["<bos>", "<eos>", "<unk>", "<mark>", "eins", "zwei", "drei", "vier"]
TEXTS = ["eins zwei drei vier drei", "eins", "", "drei drei drei drei drei drei drei drei"]


def make_tokenizer(around: str, side: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {word: vocabulary[word] for word in around.split() if word != "$A"}
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=list(special.items()))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}  # <mark> is not said to be special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, truncation_side=side, model_max_length=100, **names)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("around", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <mark> $A <mark>"])
def test_it_cuts_as_the_tokenizer_cuts(around, add_special_tokens, side):
    tokenizer = make_tokenizer(around, side)
    before = tokenizer.backend_tokenizer.to_str()
    for length in (4, 5, 100):
        rows = TextCodec(tokenizer).encode(TEXTS, max_tokens=length, add_special_tokens=add_special_tokens)
        assert tokenizer.backend_tokenizer.to_str() == before
        options = {"truncation": True, "max_length": length, "add_special_tokens": add_special_tokens}
        assert rows == make_tokenizer(around, side)(TEXTS, **options)["input_ids"]


def test_truncation_and_padding_of_others_do_not_reach_it(monkeypatch):
    tokenizer = make_tokenizer("<bos> $A <eos>", "right")
    expected = tokenizer(TEXTS)["input_ids"]
    shared = tokenizer.backend_tokenizer
    set_state = PreTrainedTokenizerFast.set_truncation_and_padding

    def interleave(self, **options):
        set_state(self, **options)
        shared.enable_truncation(3)  # another thread, after the state was set and before the text is read
        shared.enable_padding(length=50)

    monkeypatch.setattr(PreTrainedTokenizerFast, "set_truncation_and_padding", interleave)
    assert tokenizer(TEXTS)["input_ids"] != expected
    codec = TextCodec(tokenizer)
    assert codec.encode(TEXTS) == expected
    assert codec.num_special_tokens == 1
    assert (shared.truncation["max_length"], shared.padding["length"]) == (3, 50)  # no mark on theirs


def test_threads_that_truncate_and_pad_the_same_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<eos>"
    text = " ".join(CORPUS)
    codec = TextCodec(tokenizer)
    ours = [({}, codec.encode([text])), ({"max_tokens": 9}, codec.encode([text], max_tokens=9))]
    end, wrong = time.monotonic() + 1, []

    def read(options, expected) -> None:
        while time.monotonic() < end and not wrong:
            if (rows := codec.encode([text], **options)) != expected:
                wrong.append(rows)

    def disturb(**options) -> None:
        while time.monotonic() < end and not wrong:
            tokenizer([text], **options)

    threads = [threading.Thread(target=read, args=args) for args in ours]
    for options in ({"truncation": True, "max_length": 8}, {"padding": "max_length", "max_length": 300}):
        threads.append(threading.Thread(target=disturb, kwargs=options))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def add_marks(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>"]})
    tokenizer.add_tokens([AddedToken("drei", single_word=True), "neu"])
    tokenizer.add_special_tokens({"pad_token": "<two>"})


def add_bos_and_eos(tokenizer):
    tokenizer.add_bos_token = tokenizer.add_eos_token = True


def set_on_backend(name, value):
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, value)


CHANGES = {
    "nothing": lambda tokenizer: None,
    "added tokens": add_marks,
    "a token that the vocabulary holds": lambda tokenizer: tokenizer.add_tokens(["er", "\u00c3"]),
    "other flags of a token": lambda tokenizer: tokenizer.add_tokens(AddedToken("<eos>", lstrip=True, special=True)),
    "bos and eos": add_bos_and_eos,
    "special tokens are text": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    "normalizer": set_on_backend("normalizer", normalizers.Lowercase()),
    "pre-tokenizer": set_on_backend("pre_tokenizer", pre_tokenizers.Split(" ", "isolated")),
    "no template": set_on_backend("post_processor", None),
    "another backend": lambda tokenizer: setattr(tokenizer, "_tokenizer", build_tokenizer().backend_tokenizer),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", [build_tokenizer, lambda: make_tokenizer("<bos> $A <eos>", "right")])
def test_its_ids_are_those_of_the_tokenizer_as_it_is_now(make, change):
    texts = [*TEXTS, *CORPUS, "<bos> <one>EINS neu<two> drei <eos>", "\u00e9\U0001f642"]
    tokenizer = make()
    codec = TextCodec(tokenizer)
    before = codec.encode(texts)
    assert before == make()(texts)["input_ids"]
    change(tokenizer)
    for add_special_tokens in (True, False):
        rows = codec.encode(texts, add_special_tokens=add_special_tokens)
        assert rows == tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert other.encode(texts) == codec.encode(texts)
    assert codec.encode([]) == []


class SuffixTokenizer(PreTrainedTokenizerFast):
    """A class that does more than its backend, as CodeLlama's."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus([f"{one} ende" for one in text], *args, **kwargs)


def test_a_class_that_does_more_than_its_backend():
    tokenizer = SuffixTokenizer(tokenizer_object=build_tokenizer().backend_tokenizer)
    rows = TextCodec(tokenizer).encode(["It rained"])
    assert rows == tokenizer(["It rained"])["input_ids"] == build_tokenizer()(["It rained ende"])["input_ids"]


def test_a_copy_may_be_set_to_truncate():
    tokenizer = build_tokenizer()
    assert len(copy_tokenizer(tokenizer)(CORPUS[0], truncation=True, max_length=4)["input_ids"]) == 4
    assert tokenizer.backend_tokenizer.truncation is None


@pytest.mark.parametrize("freeze_base", [False, True])
def test_a_checkpoint_holds_no_mark_of_a_call(make_base, make_model, tmp_path, freeze_base):
    model = make_model(freeze_base=freeze_base)
    model.tokenizer(CORPUS[0], truncation=True, max_length=8)
    model.tokenizer.backend_tokenizer.enable_padding(length=50)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").read_bytes() == (make_base() / "tokenizer.json").read_bytes()
    assert model.tokenizer.backend_tokenizer.truncation["max_length"] == 8
