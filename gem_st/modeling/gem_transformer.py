"""GEM: one decoder-only language model that embeds text and keeps generating (arXiv 2506.04344).

This file is the Sentence-Transformers module; the files named ``gem_*`` beside it are the method. Copies of all of them
travel in every checkpoint, this one as ``gem_st.py``, so they import the standard library, what comes with
sentence_transformers, and each other only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

try:  # before the files beside it, of which old versions would raise something else
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.util import get_rank
    from transformers.masking_utils import create_masks_for_generate  # noqa: F401
except ImportError as error:
    wanted = "'sentence-transformers>=6.0' 'transformers>=5.4' 'torch>=2.7'"
    raise ImportError(f"GEM needs newer packages: pip install -U {wanted} ({error})") from error

from .gem_adapter import (
    add_adapter_with_gem_rows,
    add_lora,
    check_sharding,
    disable_checkpointing,
    import_peft,
    keep_quantized_weights,
    lora_options,
    modules_of,
    share_weights,
)
from .gem_base import Evaluating, GemBase, WithAdvice
from .gem_checkpoint import (
    check_writable,
    hash_code,
    hash_files,
    load_adapter,
    write_checkpoint,
)
from .gem_dtypes import WeightTypes
from .gem_embedder import Embedder
from .gem_files import check_tokenizer, find_base, fingerprint_tokenizer, is_local, locate
from .gem_generator import Generator, Reader
from .gem_language import LanguageMethods
from .gem_mask import Rows
from .gem_parts import max_length_of
from .gem_passes import AppendPass, CausalPass, GatedPass, PackedPass, StagedPass, check_append
from .gem_probes import probe_base
from .gem_settings import (
    CONFIG_FILE,
    HUB_KWARGS,
    NamedDamage,
    check_is_checkpoint,
    check_options,
    check_saved_settings,
    hub_kwargs_of,
    load_settings,
)
from .gem_sharding import Gathered, value_of
from .gem_tokens import GemTokens, claim_gem_tokens, find_existing_tokens, make_gem_rows, write_gem_rows
from .gem_weights import check_places

logger = logging.get_logger(__name__)


class GemTransformer(LanguageMethods, InputModule):  # type: ignore[misc]  # a tokenizer in one place, not one of its own
    """A decoder-only language model that embeds text through GEM tokens, as a Sentence-Transformers module.

    ``SentenceTransformer(modules=[GemTransformer("meta-llama/Llama-3.2-1B", num_gem_tokens=4)])`` is an embedder to
    be trained with :class:`gem_st.GemLoss` or another loss; ``model[0].generate(...)`` is the generator.

    Args:
        model_name_or_path: Hub id or folder of a decoder-only model with a language-model head, a GGUF file in one, or
            a GEM checkpoint, in which case the other settings must be those it was saved with.
        num_gem_tokens: K, the number of GEM tokens appended to each text.
        pooling: ``"mean"`` or ``"concat"`` over the hidden states at the GEM tokens.
        max_seq_length: Tokens in a row, GEM tokens included; longer texts are truncated. Defaults to what tokenizer
            and model allow.
        freeze_base: Leave the model as it is; train GEM embeddings, and a LoRA that is active only while GEM tokens are
            computed. Its settings are read from a GEM checkpoint.
        lora_rank: Rank of that LoRA, 8 by default, on all linear layers; its ``lora_alpha`` is 8 times the rank.
        lora_kwargs: Further options of ``peft.LoraConfig``, e.g. ``{"lora_dropout": 0.1}``.
        gem_tokens: Beside a frozen base, ``"reserved"``, existing tokens whose rows are the GEM tokens', untouched; K
            names of such; or ``"trained"``, rows of their own. By default reserved ones where there are enough.
        model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``, e.g. ``{"dtype": torch.float32}``. With
            ``{"gguf_file": "x.gguf"}`` a checkpoint that is an adapter alone finds its base elsewhere.
        processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``, e.g. ``{"padding_side": "left"}``.
        config_kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        ImportError: If a LoRA is needed and PEFT is not installed.
        ValueError: If a setting is out of range, the model is not a causal decoder with an attention that can be
            masked as K asks for, weights are missing, tokenizer and model do not fit each other, or a GEM checkpoint
            was saved with other settings.
        FloatingPointError: If hidden states are not finite in the data type that was asked for.

    Attributes, beside those of :class:`GemParts`:
        save_base: Whether checkpoints hold the base beside an adapter, or only name it; True by default.
        save_dtype: Data type of the weights in checkpoints of full mode, e.g. ``torch.float32``. By default, None,
            weights are saved as they are, those that :meth:`train_in_float32` cast as they were loaded.
        base_model_name_or_path: The base as checkpoints with an adapter name it.
        base_model_revision: Its commit on the Hub.

    References:
        GEM: Empowering LLM for both Embedding Generation and Language Understanding, https://arxiv.org/abs/2506.04344
    """

    config_file_name = CONFIG_FILE
    config_keys = [
        "num_gem_tokens",
        "pooling",
        "max_seq_length",
        "gem_token_ids",
        "gem_token_source",
        "gem_token_names",
        "freeze_base",
    ]
    save_in_root = True

    def __init__(
        self,
        model_name_or_path: str,
        *,
        num_gem_tokens: int = 1,
        pooling: str = "mean",
        max_seq_length: int | None = None,
        freeze_base: bool = False,
        lora_rank: int | None = None,
        lora_kwargs: dict[str, Any] | None = None,
        gem_tokens: str | Sequence[str] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        of_frozen = lora_rank, lora_kwargs, gem_tokens
        check_options(num_gem_tokens, pooling, freeze_base, of_frozen)
        self.freeze_base = freeze_base
        hub_kwargs = {key: value for key, value in (model_kwargs or {}).items() if key in HUB_KWARGS}
        saved = load_settings(self.load_config, model_name_or_path, hub_kwargs)
        asked = {"num_gem_tokens": num_gem_tokens, "pooling": pooling, "freeze_base": freeze_base}
        check_saved_settings(model_name_or_path, saved, asked, of_frozen)
        self.save_dtype: torch.dtype | None = None
        found = find_base(model_name_or_path, saved, freeze_base, hub_kwargs, (model_kwargs or {}).get("gguf_file"))
        self.save_base = saved.get("save_base", not (freeze_base and "gguf_file" in found.load_kwargs))
        has_all_rows = not freeze_base and self.save_base
        options = [
            {**(kwargs or {}), **found.load_kwargs} for kwargs in (model_kwargs, processor_kwargs, config_kwargs)
        ]
        base = self.base = GemBase.load(found.load_from, *options)
        self.model, self.gem_embeddings = base.model, None
        is_asked = any(kwargs.get(name) is not None for kwargs in options for name in ("dtype", "torch_dtype"))
        self._weight_types = WeightTypes(base.model, is_asked)
        self.base_model_name_or_path = found.name
        self.source, self.base_model_revision = locate(found, base, hub_kwargs)
        check_tokenizer(base.text.tokenizer, self.source, saved.get("tokenizer_sha256"))
        base.check_vocabulary(found.load_from, saved["gem_token_ids"] if saved and has_all_rows else ())
        writes_rows = not freeze_base and not (saved and self.save_base)
        check_places(base.model, found.load_from, freeze_base, writes_rows)
        facts = self.facts = probe_base(base, found.load_from)
        if freeze_base:
            facts.require_cache()

        named: Any = [saved.get(key) for key in ("gem_token_ids", "gem_token_source")]
        ids, source = named if saved else claim_gem_tokens(base, num_gem_tokens, freeze_base)
        is_new = freeze_base and not saved
        names = find_existing_tokens(base, gem_tokens, num_gem_tokens) if is_new else saved.get("gem_token_names")
        self.gem_tokens = GemTokens(ids, source, pooling, base, self if freeze_base and not names else None, names)
        base.text.gem_token_ids = frozenset(ids)
        if source == "reserved":
            base.text.hidden_names = tuple(base.text.tokenizer.convert_ids_to_tokens(ids))
        if max_seq_length is None and "model_max_length" not in (processor_kwargs or {}):
            max_seq_length = saved.get("max_seq_length")
        self.max_seq_length = max_seq_length
        self.logit_scale = nn.Parameter(torch.tensor([saved.get("logit_scale", math.log(20.0))]))
        if writes_rows:
            write_gem_rows(base, ids, source)
        if freeze_base:
            self._freeze(is_new=not saved)
        append = AppendPass(self.gem_model, self.gem_tokens)
        whole = StagedPass(base, facts, append) if freeze_base else CausalPass(base, self.gem_tokens)
        special = (None, GatedPass(append, base)) if freeze_base else (PackedPass(base), None)
        self.embedder = Embedder(base, facts, self.gem_tokens, whole, append, *special)
        self.reader = Reader(base, facts)
        self.generator = Generator(base, self.reader, self.gem_tokens, [] if freeze_base else ids)

        if saved and (freeze_base or not self.save_base):
            load_adapter(self, model_name_or_path, hub_kwargs)
        elif freeze_base:
            add_lora(self.gem_model, import_peft().LoraConfig(**lora_options(base, lora_rank, lora_kwargs)))
        if num_gem_tokens > 1 or freeze_base:
            self.require_attention_mask()
        if freeze_base:
            check_append(base, append)
        self.register_load_state_dict_pre_hook(keep_quantized_weights)
        self.source.num_writes = base.num_writes()
        # `SentenceTransformer.add_adapter` ends up here.
        self.model.add_adapter = partial(add_adapter_with_gem_rows, self.model, None if freeze_base else ids)

    def _freeze(self, is_new: bool) -> None:
        """Freeze the model; beside it, make GEM embeddings, and a second model of the same weights for a LoRA."""
        check_sharding(self.model)
        self.model.requires_grad_(False)
        self.model.eval()
        self.adapter_model = share_weights(self.model)
        if self.gem_tokens.names is None:
            self.gem_embeddings = nn.Parameter(make_gem_rows(self.base, self.num_gem_tokens, is_new))

    def get_config_dict(self) -> dict[str, Any]:
        """What two models of one recipe have in common, so that they can be merged."""
        return {**super().get_config_dict(), "save_base": self.save_base and not self.has_adapter}

    def settings(self) -> dict[str, Any]:
        """All that ``gem_config.json`` holds; with it a reload is exact."""
        settings, hashes = self.get_config_dict(), hash_code(__file__)
        settings |= {"logit_scale": value_of(self.logit_scale), "remote_code": hashes}
        settings["remote_code_sha256"] = hash_files(hashes)
        if self.mode == "full":  # an adapter has the whole base's
            settings["tokenizer_sha256"] = fingerprint_tokenizer(self.tokenizer)
        if settings["save_base"] and is_local(self.base_model_name_or_path):
            return settings  # a folder of this machine is nobody's business
        names = ("base_model_name_or_path", "base_model_revision")
        return {**settings, **{name: getattr(self, name) for name in names}}

    def train(self, mode: bool = True) -> GemTransformer:
        """Set training mode; a frozen base stays in evaluation mode, so that what it computes never changes."""
        if not mode:
            Evaluating.stay(self)
            if not any(module.training for module in modules_of(self)):
                return self  # `encode` asks for it on every call, and switching every module takes a while
        super().train(mode)
        if self.freeze_base:
            self.model.eval()
            if mode and any(getattr(m, "gradient_checkpointing", False) for m in self.adapter_model.modules()):
                disable_checkpointing(self.adapter_model)  # it drops the cache; K tokens need none
        return self

    # ---- text -> embedding

    def preprocess(  # type: ignore[override]  # texts only, of all that Sentence Transformers may pass
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        max_length: int | None = None,
        processing_kwargs: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Tokenise texts, truncate them so that K places remain, append the GEM tokens and pad.

        Args:
            inputs: Texts. A text that spells out the name of a GEM token is embedded as ordinary text.
            prompt: Put before every text.
            max_length: Tokens in a row, GEM tokens included, instead of :attr:`max_seq_length`.
            processing_kwargs: As Sentence Transformers passes it; ``{"text": {"max_length": 128}}`` is another way to
                say ``max_length=128``.
            **kwargs: ``task`` and ``modality``, which Sentence Transformers passes to every module; not used.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for real tokens), padded on the tokenizer's padding side; nothing of
            no inputs. Shape: ``(B, T)`` each

        Raises:
            ValueError: If an input is not a string, no place is left for text, or an option is none of these.
        """
        max_length = max_length_of(max_length, processing_kwargs, kwargs)
        rows = self.base.text.encode(inputs, prompt or "", self._num_places(max_length))
        if not rows:
            return {}
        return self.pad([torch.tensor(row + self.gem_token_ids) for row in rows])

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]  # no other options
        """Embed rows that hold K GEM tokens each, at the end or between a prefix and a suffix.

        Args:
            features: ``input_ids`` and ``attention_mask``, padded on either side, shape ``(B, T)`` each. If it also
                holds an ``objective``, that is called with this module and the :class:`Rows` instead, and what it
                returns is added: a loss's own work, done here so that DDP, FSDP and ZeRO see it.

        Returns:
            ``features`` with ``sentence_embedding`` (shape ``(B, D)``, or ``(B, K * D)`` for concat) and
            ``token_embeddings`` (shape ``(B, T, D)``) added.

        Raises:
            ValueError: If a row does not hold exactly K GEM tokens.
            torch.OutOfMemoryError: As it is raised by torch, with what to ask for instead.
        """
        rows = Rows.of(features["input_ids"], features["attention_mask"], self.gem_token_ids)
        objective = features.pop("objective", None)
        with WithAdvice():
            if objective is not None:
                features = {**features, **objective(self, rows)}
            else:
                states = self.embedder.states(rows)
                features["sentence_embedding"] = self.gem_tokens.pool(states, rows.segments)
                features["token_embeddings"] = rows.restore(states)
        features["sentence_embedding"] = features["sentence_embedding"].to(self.embedding_dtype)
        return features

    # ---- checkpoints

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the ``*ForCausalLM``, the tokenizer, ``gem_config.json`` and its code into a folder.

        Args:
            output_path: The folder.
            *args: Not used.
            safe_serialization: Only True: weights are always safetensors.
            **kwargs: Passed to ``save_pretrained`` of the model, e.g. ``max_shard_size="5GB"``.

        Weights sharded over processes (FSDP2, ZeRO 3) are gathered, for which every process has to call this; the first
        one writes.

        Raises:
            ValueError: If ``safe_serialization`` is False, there is no adapter to be saved alone, or the base beside
                an adapter was changed.
        """
        if not safe_serialization:
            raise ValueError("GEM checkpoints hold safetensors only; save with safe_serialization=True.")
        check_writable(self)
        with Gathered(self) as is_first:
            if is_first and get_rank() == 0:
                write_checkpoint(self, Path(output_path), __file__, **kwargs)
            elif is_first:
                logger.warning_once("Of several processes the first one writes the checkpoint; this one does not.")

    @classmethod
    def load(  # type: ignore[override]  # where it is, is handed on as Sentence Transformers names it
        cls,
        model_name_or_path: str,
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> GemTransformer:
        """Load a GEM checkpoint from a folder or the Hub, as Sentence Transformers calls it.

        Args:
            model_name_or_path: Folder or Hub id.
            trust_remote_code: Passed on, for bases that bring code of their own.
            model_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.
            processor_kwargs: Passed to ``AutoTokenizer.from_pretrained``.
            config_kwargs: Passed to ``AutoConfig.from_pretrained``.
            backend: Only ``"torch"``.
            **kwargs: ``subfolder``, ``token``, ``cache_folder``, ``revision`` and ``local_files_only``.

        Raises:
            ValueError: If the checkpoint holds no GEM settings, was not saved completely, a file of it is damaged, or
                ``backend`` is not ``"torch"``.
        """
        hub_kwargs = hub_kwargs_of(backend, kwargs)
        with NamedDamage(model_name_or_path, hub_kwargs["subfolder"] or ""):
            saved = load_settings(cls.load_config, model_name_or_path, hub_kwargs)
            check_is_checkpoint(model_name_or_path, hub_kwargs["subfolder"], saved)
            given = {"model_kwargs": model_kwargs, "processor_kwargs": processor_kwargs, "config_kwargs": config_kwargs}
            options = {"trust_remote_code": trust_remote_code, **hub_kwargs}
            return cls(
                model_name_or_path,
                num_gem_tokens=saved["num_gem_tokens"],
                pooling=saved["pooling"],
                freeze_base=saved.get("freeze_base", False),
                **cast("Any", {name: {**options, **(values or {})} for name, values in given.items()}),
            )


if __name__ == "gem_st.modeling.gem_transformer":
    # The class's public name, as numpy does it: checkpoints name `gem_st.GemTransformer`, and carry this file as
    # `gem_st.py`, so that they load alike with and without the package. A copy's class stays where it is found.
    GemTransformer.__module__ = "gem_st"
