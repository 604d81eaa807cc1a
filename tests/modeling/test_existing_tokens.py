"""GEM tokens beside a frozen base whose rows are existing tokens', untouched."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from gem_st import GemLoss, GemTransformer

from ..conftest import CORPUS, build_tokenizer

NAMES = [f"<|reserved_special_token_{index}|>" for index in range(4)]


@pytest.fixture
def make(make_model):
    def make(**kwargs):
        return make_model(**{"freeze_base": True, "num_reserved": 4, "gem_tokens": "reserved", **kwargs})

    return make


def test_rows_are_the_vocabularys_and_only_the_lora_is_trained(make):
    gem = make(num_gem_tokens=2)[0]
    assert gem.gem_tokens.names == [NAMES[3], NAMES[2]]
    row_ids = gem.tokenizer.convert_tokens_to_ids(gem.gem_tokens.names)
    assert torch.equal(gem.gem_tokens.rows, gem.model.get_input_embeddings().weight[row_ids])
    assert "gem_embeddings" not in gem.state_dict()
    assert all("lora_" in name or name == "logit_scale" for name, p in gem.named_parameters() if p.requires_grad)
    loss = GemLoss(SentenceTransformer(modules=[gem], device="cpu")).train()
    before = gem.gem_tokens.rows.clone()
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    loss([gem.preprocess(CORPUS)]).backward()
    optimizer.step()
    assert torch.equal(gem.gem_tokens.rows, before)


def test_a_text_may_spell_the_token(make):
    model = make()
    text = f"before {NAMES[3]} behind"
    ids = model.tokenize([text])["input_ids"][0].tolist()
    assert model.tokenizer.convert_tokens_to_ids(NAMES[3]) in ids
    assert np.allclose(model.encode([text, "a"])[0], model.encode(text), atol=1e-5)


@pytest.mark.parametrize("num_gem_tokens", [1, 3])
def test_a_checkpoint_has_the_same_vectors(make, tmp_path, num_gem_tokens):
    model = make(num_gem_tokens=num_gem_tokens)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "gem_adapter" / "gem_rows.safetensors").exists()
    assert json.loads((tmp_path / "gem_config.json").read_text())["gem_token_names"] == model[0].gem_tokens.names
    config = json.loads((tmp_path / "gem_adapter" / "adapter_config.json").read_text())
    assert (config.get("alora_invocation_tokens") is not None) == (num_gem_tokens == 1)
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert np.array_equal(again.encode(CORPUS), model.encode(CORPUS))
    assert again[0].gem_tokens.names == model[0].gem_tokens.names
    options = {"num_gem_tokens": num_gem_tokens, "freeze_base": True, "gem_tokens": "reserved"}
    with pytest.raises(ValueError, match="Leave out lora_rank, lora_kwargs and gem_tokens"):
        GemTransformer(str(tmp_path), **options)
    settings = json.loads((tmp_path / "gem_config.json").read_text())
    settings["gem_token_names"][0] = "<|gone|>"
    (tmp_path / "gem_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"lacks \['<.gone.>'\]"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_plain_peft_gives_the_same_vectors(make, run_without_gem_st, tmp_path, architecture):
    """The adapter is an activated LoRA of PEFT's own."""
    model = make(architecture=architecture)
    model.save_pretrained(str(tmp_path / "checkpoint"))
    torch.save({"texts": CORPUS, "vectors": model.encode(CORPUS, convert_to_tensor=True)}, tmp_path / "expected.pt")
    run_without_gem_st(
        """
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, token, expected = sys.argv[1:]
        base = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = PeftModel.from_pretrained(base, f"{folder}/gem_adapter").eval()
        assert model.peft_config["default"].alora_invocation_tokens == [tokenizer.convert_tokens_to_ids(token)]
        expected = torch.load(expected)
        for text, vector in zip(expected["texts"], expected["vectors"]):
            ids = tokenizer(text + token, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            state, vector = (torch.nn.functional.normalize(each, dim=0) for each in (states[0, -1], vector))
            assert torch.allclose(state, vector, atol=1e-5), (text, (state - vector).abs().max())
        """,
        tmp_path / "checkpoint",
        model[0].gem_tokens.names[0],
        tmp_path / "expected.pt",
    )


def test_tokens_that_something_uses_are_refused(make):
    template = f"{{{{ messages[0].content }}}}{NAMES[3]}"
    assert make(chat_template=template)[0].gem_tokens.names == [NAMES[2]]
    for names in ([NAMES[3]], ["<eos>"], ["the"], ["no such token"], NAMES[:2], [NAMES[0]] * 2):
        with pytest.raises(ValueError, match=r"needs as many special tokens.*There are 3"):
            make(chat_template=template, gem_tokens=names, num_gem_tokens=max(1, len(names) - 1))
    with pytest.raises(ValueError, match="'reserved', 'trained' or 1 names of tokens"):
        make(gem_tokens="unused")
    with pytest.raises(ValueError, match=r"needs as many special tokens.*There are 0"):
        make(num_reserved=0)
    with pytest.raises(ValueError, match="belong to freeze_base=True"):
        make(freeze_base=False)


def test_tokens_with_equal_rows_count_once(make_base, tmp_path):
    """K equal rows would be K times the same state."""
    base = AutoModelForCausalLM.from_pretrained(make_base(num_reserved=4))
    tokenizer = build_tokenizer(num_reserved=4)
    ids = tokenizer.convert_tokens_to_ids(NAMES)
    with torch.no_grad():
        base.get_input_embeddings().weight[ids[1:]] = 0
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gem = GemTransformer(str(tmp_path), num_gem_tokens=2, freeze_base=True, gem_tokens="reserved")
    assert gem.gem_tokens.names == [NAMES[0], NAMES[3]]
    with pytest.raises(ValueError, match="There are 2"):
        GemTransformer(str(tmp_path), num_gem_tokens=3, freeze_base=True, gem_tokens="reserved")
    gem = GemTransformer(str(tmp_path), num_gem_tokens=2, freeze_base=True)
    assert gem.gem_tokens.names is None, "by default a row of nothing is no GEM token's"


def test_by_default_rows_are_existing_ones_where_there_are_enough(make, tmp_path):
    assert make(gem_tokens=None)[0].gem_tokens.names == [NAMES[3]]
    assert make(gem_tokens=None, num_gem_tokens=4)[0].gem_tokens.names == NAMES[::-1]
    model = make(gem_tokens="trained")
    for gem in (model[0], make(gem_tokens=None, num_gem_tokens=5)[0], make(gem_tokens=None, num_reserved=0)[0]):
        assert gem.gem_tokens.names is None
        assert gem.gem_embeddings.requires_grad
    model.save_pretrained(str(tmp_path))  # as all checkpoints before there was a choice
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert again[0].gem_tokens.names is None
    assert np.array_equal(again.encode(CORPUS), model.encode(CORPUS))
