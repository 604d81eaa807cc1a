"""Small models and tokenizers built in code, so that the suite needs no network and no files but its own."""

from __future__ import annotations

import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.utils import logging as transformers_logging

from gem_st import GemTransformer
from gem_st.training import preview

from .forked_python import ForkedPython

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {field.name for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
CHECKPOINTING = {next(name for name in preview.CHECKPOINTING if name in ARGUMENTS): True}
"""The training argument that has activations computed once more, by the name that this transformers has for it."""

BASE_8M = ROOT / "examples" / "base-8m"
SHARED = Path(os.environ.get("GEM_ST_SHARED", ROOT.parent / "shared"))

CORPUS = [
    "Once upon a time there was a small village by the sea.",
    "The fisherman took his boat out before the sun came up.",
    "She bought bread, apples and a little cheese at the market.",
    "It rained all day, and the children stayed inside to read.",
    "The old clock on the wall had stopped many years ago.",
    "A letter came from the city with good news for the family.",
    "They walked along the river until the light was gone.",
    "He plays the violin every evening after work.",
]

SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, Callable[..., torch.nn.Module]] = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**{**SIZES, **kw})),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **kw})),
    "phi3": lambda **kw: Phi3ForCausalLM(Phi3Config(**{**SIZES, "pad_token_id": 1, **kw})),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **kw})),
    "mistral": lambda **kw: MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": 6, **kw})),
    "gemma3": lambda **kw: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{
                **SIZES,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
                "pad_token_id": 1,
                **kw,
            }
        )
    ),
    "gpt_neo": lambda **kw: GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            bos_token_id=0,
            eos_token_id=1,
            **{"window_size": 6, "max_position_embeddings": 256, **kw},
        )
    ),
}


def build_tokenizer(num_reserved: int = 0, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``CORPUS`` that puts ``<bos>`` first and, as most base models', has no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(num_reserved)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=256,
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that writes a random base model with a tokenizer to a folder, once for each set of arguments."""
    made: dict[tuple, Path] = {}

    def make(
        architecture: str = "llama",
        *,
        num_reserved: int = 0,
        chat_template: str | None = None,
        dtype: torch.dtype = torch.float32,
        **config: object,
    ) -> Path:
        tokenizer = build_tokenizer(num_reserved, chat_template)
        config.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)
        key = (architecture, num_reserved, chat_template, dtype, repr(sorted(config.items())))
        if key not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(architecture)
            ARCHITECTURES[architecture](**config).to(dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def make_model(make_base: Callable[..., Path]) -> Callable[..., SentenceTransformer]:
    """Function that builds a SentenceTransformer on a random base; arguments of both may be mixed."""

    def make(architecture: str = "llama", **kwargs: object) -> SentenceTransformer:
        own = inspect.signature(GemTransformer).parameters
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in own}
        base = str(make_base(architecture, **kwargs))
        torch.manual_seed(0)  # the GEM rows are drawn from the global generator
        gem = GemTransformer(base, **settings)
        with torch.no_grad():  # a LoRA starts at nothing; as if it had been trained
            for name, weight in gem.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
        return SentenceTransformer(modules=[gem], device="cpu")

    return make


def quiet_arguments(folder: str | Path, **options: object) -> SentenceTransformerTrainingArguments:
    """Arguments of a training on the CPU that reports to nobody and draws no bars."""
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return SentenceTransformerTrainingArguments(str(folder), **{**quiet, **options})


WITHOUT_BITSANDBYTES = "import sys\nsys.modules['bitsandbytes'] = None\n"
"""PEFT imports it where it is installed, which takes seconds; the tests that need it run in this process."""


@pytest.fixture(scope="session", autouse=True)
def _children_start_sooner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT_BITSANDBYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedPython]:
    """Runs scripts in processes of their own, which start with the libraries imported, but not gem_st."""
    running = ForkedPython(tmp_path_factory.mktemp("python"))
    yield running
    running.close()


@pytest.fixture
def run_without_gem_st(tmp_path: Path, python: ForkedPython) -> Callable[..., str]:
    """Function that runs code in a process, and its children, in which importing gem_st fails."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"{WITHOUT_BITSANDBYTES}sys.modules['gem_st'] = None\n")

    def run(code: str, *args: object, env: dict[str, str] | None = None) -> str:
        script = tmp_path / "script.py"
        body = textwrap.indent(textwrap.dedent(code), "    ")
        script.write_text(f"import sys\n\nif __name__ == '__main__':\n{body}")
        env = env or {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        env = {**env, "PYTHONPATH": str(site)}
        done = python.run(script, *args, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def warnings_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, with what goes through transformers' logger in it."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()
