"""TextCodec: what it cuts is what the tokenizer itself would cut, and the tokenizer stays as it is."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gem_st.modeling.gem_text import TextCodec

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
