"""What scores are filed under: all that they depend on, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from gem_st.evaluation.identity import digest_generator, fingerprint


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}


@pytest.mark.parametrize(
    ("file", "values", "is_generator"),
    [
        ("config.json", {"hidden_act": "relu"}, True),
        ("tokenizer.json", {"normalizer": REPLACE}, True),
        ("gem_adapter/adapter_config.json", {"lora_alpha": 1}, True),
        ("config_sentence_transformers.json", {"truncate_dim": 4}, False),
        ("config_sentence_transformers.json", {"similarity_fn_name": "dot"}, False),
        ("config_sentence_transformers.json", {"prompts": {"STS": "about: "}}, False),
        ("gem_config.json", {"max_seq_length": 8}, False),
    ],
)
def test_a_changed_file_is_another_model(
    make_model: Callable[..., Any], tmp_path: Path, file: str, values: dict[str, Any], is_generator: bool
) -> None:
    model = make_model()
    if "adapter" in file:
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    paths = [tmp_path / "one", tmp_path / "two"]
    one, same = (SentenceTransformer(str(path), trust_remote_code=True, device="cpu") for path in paths)
    digests = [fingerprint(one), digest_generator(one[0].model, one[0].tokenizer)]
    one.encode(["a text", "another, which is longer"])
    assert digests == [fingerprint(one), digest_generator(one[0].model, one[0].tokenizer)]
    assert digests == [fingerprint(same), digest_generator(same[0].model, same[0].tokenizer)]
    change(tmp_path / "two" / file, **values)
    if file == "tokenizer.json":  # which it would be refused with
        settings = json.loads((tmp_path / "two/gem_config.json").read_text(encoding="utf-8"))
        del settings["tokenizer_sha256"]
        (tmp_path / "two/gem_config.json").write_text(json.dumps(settings), encoding="utf-8")
    other = SentenceTransformer(str(tmp_path / "two"), trust_remote_code=True, device="cpu")
    assert fingerprint(other) != digests[0]
    assert (digest_generator(other[0].model, other[0].tokenizer) != digests[1]) is is_generator
