"""The four modes of the example: each trains, is saved and reloaded, is resumed, and is merged or says why not."""

from __future__ import annotations

import importlib.util
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import BitsAndBytesConfig

from gem_st import GemLoss, merge_lora

from ..conftest import CORPUS, ROOT, quiet_arguments

QLORA = pytest.param(
    "qlora", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra qlora")
)
MODES = ["full", "frozen", "lora", QLORA]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Of the base: whole blocks of 64 weights, as bitsandbytes quantises them."""
QUANTIZED = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example("train_self_supervised")


def load(folder: Path, mode: str) -> SentenceTransformer:
    options = {"dtype": torch.float32, **(QUANTIZED if mode == "qlora" else {})}
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", model_kwargs=options)


def train(base: Path, mode: str, folder: Path, resume: str | None = None) -> SentenceTransformer:
    """Six steps, saved after four, of rows and views that are drawn at random."""
    torch.manual_seed(0 if resume is None else 1)
    model = EXAMPLE.build_model(str(base), mode, 2).to("cpu")
    arguments = quiet_arguments(folder, max_steps=6, save_steps=4, per_device_train_batch_size=3, learning_rate=1e-2)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        loss=GemLoss(model, alpha=0.5, plain_ratio=0.5, token_dropout=0.5),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    return model


@pytest.fixture(scope="module")
def trained(make_base, tmp_path_factory) -> Any:
    """Function that gives a trained model of a mode and its folder."""
    results: dict[str, tuple[SentenceTransformer, Path]] = {}

    def get(mode: str) -> tuple[SentenceTransformer, Path]:
        if mode not in results:
            folder = tmp_path_factory.mktemp(mode)
            results[mode] = train(make_base(**WIDTHS), mode, folder), folder
        return results[mode]

    return get


@pytest.mark.parametrize("mode", MODES)
def test_what_was_trained_is_saved_and_reloaded(make_base, trained, mode):
    model, folder = trained(mode)
    torch.manual_seed(0)
    start = EXAMPLE.build_model(str(make_base(**WIDTHS)), mode, 2).to("cpu")
    vectors = [each.encode(CORPUS, convert_to_tensor=True) for each in (model, load(folder, mode), start)]
    assert torch.equal(vectors[1], vectors[0])
    assert not torch.allclose(vectors[2], vectors[0], atol=1e-2)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(("lora_" in name) == (mode != "full") for name in names if "proj" in name)
    assert any(weight.dtype == torch.uint8 for weight in model.parameters()) == (mode == "qlora")


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_resumed_to_the_weights_of_an_uninterrupted_training(make_base, trained, tmp_path, mode):
    model, folder = trained(mode)
    resumed = train(make_base(**WIDTHS), mode, tmp_path / "out", resume=str(folder / "checkpoint-4"))
    expected, result = (dict(each.named_parameters()) for each in (model, resumed))
    names = {name for name, weight in expected.items() if weight.requires_grad}
    assert names == {name for name, weight in result.items() if weight.requires_grad}
    for name in names:
        assert torch.equal(result[name], expected[name]), name
    assert torch.equal(*(each.encode(CORPUS, convert_to_tensor=True) for each in (model, resumed)))


@pytest.mark.parametrize("mode", ["lora", QLORA])
def test_a_lora_from_a_checkpoint_is_merged_into_a_float32_base(trained, tmp_path, mode):
    folder = trained(mode)[1] / "checkpoint-4"
    model = load(folder, "lora")  # qlora too: the checkpoint names the base as it is stored, not quantised
    expected, text = model.encode(CORPUS, convert_to_tensor=True), model[0].generate("It rained", max_new_tokens=6)
    merge_lora(model)
    assert torch.allclose(model.encode(CORPUS, convert_to_tensor=True), expected, atol=1e-5)
    assert model[0].generate("It rained", max_new_tokens=6) == text
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "gem_adapter").exists()
    again = load(tmp_path, "full")
    assert torch.equal(again.encode(CORPUS, convert_to_tensor=True), model.encode(CORPUS, convert_to_tensor=True))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("full", r"There is no adapter to merge. model.add_adapter"),
        ("frozen", "LoRA of a frozen base cannot be merged"),
        pytest.param(
            *("qlora", r"Merging into weights of torch.uint8 would round .* load it with .*float32.*, merge"),
            marks=QLORA.marks,
        ),
    ],
)
def test_what_cannot_be_merged_says_what_to_do(trained, mode, message):
    model, _ = trained(mode)
    expected = model.encode(CORPUS, convert_to_tensor=True)
    with pytest.raises(ValueError, match=message):
        merge_lora(model)
    assert torch.equal(model.encode(CORPUS, convert_to_tensor=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_example_trains_and_resumes(make_base, tmp_path, monkeypatch, mode):
    (tmp_path / "texts.txt").write_text("\n".join(CORPUS))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    resumed_from, run = [], EXAMPLE.SentenceTransformerTrainer.train

    def note(trainer, resume_from_checkpoint=None):
        resumed_from.append(resume_from_checkpoint)
        return run(trainer, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(EXAMPLE.SentenceTransformerTrainer, "train", note)
    base, texts, out = make_base(**WIDTHS), tmp_path / "texts.txt", tmp_path / "out"
    options = ["--base", base, "--texts", texts, "--output", out, "--mode", mode]
    for more in (["--steps", "2"], ["--steps", "3", "--resume"]):
        monkeypatch.setattr("sys.argv", ["train", *map(str, options), "--batch-size", "4", *more])
        EXAMPLE.main()
    assert resumed_from == [None, str(tmp_path / "out" / "checkpoint-2")]
    assert (tmp_path / "out" / "checkpoint-3").exists()
    assert load(tmp_path / "out", mode).encode(CORPUS).shape == (8, 64)


def lora_gradients(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """Of a sum of squares, with every LoRA weight set to something."""
    weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    for weight in weights.values():
        weight.data = torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight)
    model.train()
    model(model.preprocess(CORPUS))["sentence_embedding"].square().sum().backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("widths", [WIDTHS, {}], ids=["whole blocks", "narrow"])
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra qlora")
def test_gradients_pass_4_bit_layers_that_were_evaluated_before(make_base, widths):
    from bitsandbytes.functional import dequantize_4bit

    base, models = str(make_base(**widths)), []
    for mode in ("qlora", "lora"):
        torch.manual_seed(0)
        models.append(EXAMPLE.build_model(base, mode, 1).to("cpu"))
    quantized, dense = models
    for name, weight in quantized.named_parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            dense.get_parameter(name).data = dequantize_4bit(weight.data, state)
    vectors = [model.encode(CORPUS, convert_to_tensor=True) for model in models]
    assert torch.allclose(*vectors, atol=1e-4)
    gradients, expected = (lora_gradients(model) for model in models)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra qlora")
def test_layers_that_the_kernel_does_not_take_are_named_in_one_sentence(make_base, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shape '[32, 0]' is invalid for input of size 16")

    monkeypatch.setattr("bitsandbytes.matmul_4bit", refuse)
    message = r"does not run on cpu when quantised by BITS_AND_BYTES: shape '\[32, 0\]'.*Leave out quantization_config"
    with pytest.raises(ValueError, match=message):
        EXAMPLE.build_model(str(make_base()), "qlora", 1)
