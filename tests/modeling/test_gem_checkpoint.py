"""A checkpoint loads everywhere: with gem_st, without it, as a plain generator, again after a stranger saved it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import AutoModelForCausalLM

from gem_st import GemLoss, GemTransformer
from gem_st.modeling.gem_checkpoint import REQUIREMENTS
from gem_st.modeling.gem_files import fingerprint_tokenizer

from ..conftest import CORPUS, quiet_arguments

TEXTS = ["It rained all day.", "She bought bread at the market.", "", "\U0001f642 a letter"]

EMBED = """
import json
import numpy as np
from sentence_transformers import SentenceTransformer
try:
    import gem_st
    raise SystemExit("gem_st can be imported")
except ImportError:
    pass
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
assert type(model[0]).__module__.startswith("transformers_modules"), type(model[0]).__module__
np.save(sys.argv[2], model.encode(json.loads(sys.argv[3])))
"""


@pytest.fixture
def saved(make_base, tmp_path) -> tuple[SentenceTransformer, Path]:
    """An untied model with three GEM tokens, and the folder it was saved to."""
    torch.manual_seed(0)
    gem = GemTransformer(str(make_base(tie_word_embeddings=False)), num_gem_tokens=3, max_seq_length=64)
    model = SentenceTransformer(modules=[gem], prompts={"query": "find: "}, device="cpu")
    with torch.no_grad():
        gem.logit_scale.fill_(2.5)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(str(folder))
    return model, folder


def test_what_lies_in_a_checkpoint(saved):
    model, folder = saved
    assert json.loads((folder / "modules.json").read_text())[0]["type"] == "gem_st.GemTransformer"
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")}
    assert json.loads((folder / "gem_config.json").read_text()) == {
        "num_gem_tokens": 3,
        "pooling": "mean",
        "max_seq_length": 64,
        "gem_token_ids": model[0].gem_token_ids,
        "gem_token_source": "grown",
        "gem_token_names": None,
        "freeze_base": False,
        "logit_scale": 2.5,
        "save_base": True,
        "tokenizer_sha256": fingerprint_tokenizer(model.tokenizer),
        "remote_code": hashes,
        "remote_code_sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
    }
    source = Path(__file__).parents[2] / "gem_st" / "modeling"
    written = {path.name: path.read_text() for path in folder.glob("*.py")}
    written["gem_transformer.py"] = written.pop("gem_st.py")
    assert written == {path.name: path.read_text() for path in source.glob("gem_*.py")}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == model[0].gem_token_ids
    assert not [*folder.rglob("*.bin"), *folder.rglob("*.pkl"), *folder.rglob("*.pt")]


def test_versions_that_are_too_old_are_named(saved):
    needed = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in requires("gem-st") if "extra ==" not in line)
    assert needed.items() >= REQUIREMENTS.items()
    _, folder = saved
    config = folder / "config_sentence_transformers.json"
    assert json.loads(config.read_text())["requirements"] == REQUIREMENTS
    config.write_text(config.read_text().replace(">=5.4", ">=99"))
    with pytest.raises(ImportError, match=r"transformers.*>=99"):
        SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize(
    "older",
    [
        "sys.modules['sentence_transformers.base.modules'] = None",
        "from transformers import AutoModelForCausalLM, masking_utils\ndel masking_utils.create_masks_for_generate",
    ],
    ids=["sentence-transformers", "transformers"],
)
def test_older_libraries_get_one_clear_line(saved, python, older):
    _, folder = saved
    code = f"import sys, torch, transformers\n{older}\nimport gem_st"  # beside the script: the checkpoint's file
    (folder / "older.py").write_text(code)
    done = python.run("older.py", env={**os.environ, "HF_HOME": "hf", "HF_HUB_OFFLINE": "1"}, cwd=folder)
    assert done.returncode != 0
    assert str(folder / "gem_st.py") in done.stderr
    assert "ImportError: GEM needs newer packages: pip install -U 'sentence-transformers>=6.0'" in done.stderr


def test_reload_with_gem_st_is_exact(saved):
    model, folder = saved
    again = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again[0].settings() == model[0].settings()
    assert again.prompts["query"] == "find: "
    assert again.max_seq_length == 64
    assert again[0].generate("It rained", max_new_tokens=6) == model[0].generate("It rained", max_new_tokens=6)


def test_reload_through_the_class_is_exact(saved):
    model, folder = saved
    for gem in (GemTransformer.load(str(folder)), GemTransformer(str(folder), num_gem_tokens=3)):
        again = SentenceTransformer(modules=[gem], device="cpu")
        assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_plain_transformers_reads_the_generator_and_initialises_nothing(saved):
    model, folder = saved
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[0, 10, 11, 12]])
    assert torch.equal(plain(ids).logits, model[0].model(ids).logits)
    assert plain.generation_config.suppress_tokens == model[0].gem_token_ids


def test_export_loads_without_gem_st_to_the_bit(saved, run_without_gem_st, tmp_path):
    model, folder = saved
    run_without_gem_st(EMBED, folder, tmp_path / "out.npy", json.dumps(TEXTS))
    assert np.array_equal(np.load(tmp_path / "out.npy"), model.encode(TEXTS))


def test_a_stranger_saves_it_again_and_it_loads_again(saved, run_without_gem_st, tmp_path):
    model, folder = saved
    code = """
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
    print(model[0].generate("It rained", max_new_tokens=6))
    model.save_pretrained(sys.argv[2])
    """
    text = run_without_gem_st(code, folder, tmp_path / "again")
    assert model[0].generate("It rained", max_new_tokens=6) in text
    run_without_gem_st(EMBED, tmp_path / "again", tmp_path / "out.npy", json.dumps(TEXTS))
    assert np.array_equal(np.load(tmp_path / "out.npy"), model.encode(TEXTS))
    for name in ("gem_st.py", "gem_config.json", "modules.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # ... and by somebody who has gem_st
    assert np.array_equal(
        SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu").encode(TEXTS),
        model.encode(TEXTS),
    )


def test_a_pool_of_processes_on_a_strangers_copy(saved, run_without_gem_st, tmp_path):
    model, folder = saved
    code = """
    import json
    import numpy as np
    from sentence_transformers import SentenceTransformer
    SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu").save_pretrained(sys.argv[4])
    model = SentenceTransformer(sys.argv[4], trust_remote_code=True, device="cpu")
    pool = model.start_multi_process_pool(["cpu"])
    np.save(sys.argv[2], model.encode(json.loads(sys.argv[3]), pool=pool, chunk_size=4))
    model.stop_multi_process_pool(pool)
    """
    run_without_gem_st(code, folder, tmp_path / "out.npy", json.dumps(TEXTS), tmp_path / "again")
    assert np.array_equal(np.load(tmp_path / "out.npy"), model.encode(TEXTS))


def test_a_pool_of_processes_with_gem_st(saved):
    model, _ = saved
    pool = model.start_multi_process_pool(["cpu"])
    try:
        vectors = model.encode(TEXTS, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-6)


def train(model: SentenceTransformer, folder: Path, resume: bool = False, **kwargs) -> SentenceTransformerTrainer:
    arguments = quiet_arguments(
        folder, **{"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-2, **kwargs}
    )
    data = Dataset.from_dict({"text": CORPUS})
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=GemLoss(model, alpha=0.5)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_checkpoint_loads_without_gem_st(make_model, run_without_gem_st, tmp_path):
    model = make_model(num_gem_tokens=2)
    train(model, tmp_path / "run", save_steps=4)
    run_without_gem_st(EMBED, tmp_path / "run" / "checkpoint-4", tmp_path / "out.npy", json.dumps(TEXTS))
    assert np.array_equal(np.load(tmp_path / "out.npy"), model.encode(TEXTS))


def test_the_best_checkpoint_is_reloaded_at_the_end(make_model, tmp_path):
    model = make_model(num_gem_tokens=2)
    trainer = train(
        model,
        tmp_path / "run",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # the largest loss, i.e. an early checkpoint, so that the reload is seen
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-6")
    expected = SentenceTransformer(best, trust_remote_code=True, device="cpu")
    assert np.array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    assert torch.equal(model[0].logit_scale, expected[0].logit_scale)


def test_resuming_ends_at_the_same_weights(make_model, tmp_path):
    straight = make_model(num_gem_tokens=2)
    train(straight, tmp_path / "straight")
    stopped = make_model(num_gem_tokens=2)
    train(stopped, tmp_path / "run")
    resumed = make_model(num_gem_tokens=2)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    trainer = train(resumed, tmp_path / "run", resume=True)
    assert trainer.state.global_step == 4
    for (name, expected), value in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5, msg=name)
    assert straight[0].logit_scale.item() != pytest.approx(np.log(20.0), abs=1e-4)


def test_a_loaded_checkpoint_is_trained_further(saved, tmp_path):
    _, folder = saved
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert not isinstance(model[0], GemTransformer)  # its class comes with the checkpoint
    before = model.encode(TEXTS)
    train(model, tmp_path / "run", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    assert abs(model.encode(TEXTS) - before).max() > 1e-4
    again = SentenceTransformer(str(tmp_path / "run" / "checkpoint-4"), trust_remote_code=True, device="cpu")
    assert again.encode(TEXTS).shape == before.shape


def test_shards_are_written_and_read(saved, tmp_path):
    model, _ = saved
    model[0].save(str(tmp_path), max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = SentenceTransformer(modules=[GemTransformer.load(str(tmp_path))], device="cpu")
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_a_normalize_module_behind_it_is_kept(make_base, tmp_path):
    from sentence_transformers.base.modules import Normalize

    model = SentenceTransformer(modules=[GemTransformer(str(make_base())), Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert np.linalg.norm(again.encode("It rained.")) == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
