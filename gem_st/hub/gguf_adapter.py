"""An activated LoRA for llama.cpp: one GGUF file beside the user's own GGUF, for K = 1 beside a frozen base.

llama.cpp applies such an adapter from its invocation token on, which is what a GEM token on an existing row is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from ..cards.card_data import render_card
from ..files import hash_file, write_json
from ..finding import require_gem
from ..modeling.gem_adapter import products_in
from ..modeling.gem_checkpoint import active_adapter
from ..modeling.gem_gguf import ARCHITECTURES, import_gguf, open_gguf
from ..modeling.gem_tokens import RESERVED
from .layout import CARD, REFERENCE_TEXTS

ADAPTER_FILE, VECTORS_FILE = "gem-adapter.gguf", "reference_vectors.json"

NUM_SENT = 2
"""How often texts for llama.cpp's server end in the GEM token. It has an adapter act from one token before the last of
them, ``invocation_start - 1`` in server-context.cpp; the state is that of the first."""

NUM_ROWS = 16
"""Rows of each weight that are compared with the file's."""

ERROR_OF_BIT = 1.44
"""Relative error of a normally distributed block of 32 values cut to one bit; of b bits ``1.44 / (2^b - 1)``"""


def check_activated(model: SentenceTransformer) -> None:
    """Make sure that a model is an activated LoRA.

    Raises:
        ValueError: If it is not, with the reason.
    """
    gem = require_gem(model)
    if others := [type(module).__name__ for module in list(model)[1:] if type(module) is not Normalize]:
        raise ValueError(f"Behind the GEM module there is {' and '.join(others)}, which llama.cpp has no place for.")
    if not gem.freeze_base:
        raise ValueError(
            "An adapter for llama.cpp leaves the base as it is, but this model was trained in full mode. Use "
            'format="stock", which llama.cpp\'s converter reads, or train with freeze_base=True.'
        )
    if gem.num_gem_tokens > 1:
        raise ValueError(
            f"llama.cpp applies an adapter from one token on, and this model has {gem.num_gem_tokens} GEM tokens, "
            "which would see each other there. Train with num_gem_tokens=1."
        )
    if gem.gem_tokens.names is None:
        raise ValueError(
            "The GEM token has a trained row of its own, which no file beside the base's can hold: llama.cpp refuses "
            f"an adapter of the vocabulary. Train with gem_tokens={RESERVED!r}."
        )


class GgufBase:
    """A GGUF file, and how a base's weights lie in it.

    Args:
        path: The file.
        model: The base in memory.

    Raises:
        ValueError: If it is no GGUF file, or of another architecture.
    """

    def __init__(self, path: Path, model: Any) -> None:
        self.gguf, self.path, self.config = import_gguf(), path, model.config.get_text_config()
        self.reader = open_gguf(path)
        self.architecture = ARCHITECTURES.get(self.config.model_type, "")
        if not self.architecture:
            raise ValueError(
                f"It is not known how llama.cpp stores the weights of {self.config.model_type}; of these it is: "
                f"{', '.join(ARCHITECTURES)}."
            )
        if self.read("general.architecture") != self.architecture:
            raise ValueError(
                f"{path} holds a model of the kind {self.read('general.architecture')!r}, and the adapter was trained "
                f"on a {self.architecture!r}."
            )
        kind = next(key for key, name in self.gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self.names = self.gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def read(self, key: str) -> Any:
        """A value of the file's header; None if there is none."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def name_of(self, weight: str) -> str:
        """What the file calls a weight of the model, without ``.weight``.

        Raises:
            ValueError: If it has none such.
        """
        name = self.names.get_name(weight)
        if name is None or f"{name}.weight" not in self.tensors:
            raise ValueError(f"{self.path} has no weight for {weight}, which the adapter works on.")
        return name

    def permute(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Rows in the order of the file: Llama's queries and keys are stored in pairs for its rotary embedding."""
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.rpartition(".")[2])
        if self.architecture != "llama" or heads is None:
            return weight
        num_heads = getattr(self.config, heads)
        pairs = weight.reshape(num_heads, 2, len(weight) // num_heads // 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def check_vocabulary(self, gem: Any) -> None:
        """Raise if the file's vocabulary is another one."""
        tokens, num_rows = self.read("tokenizer.ggml.tokens") or [], len(gem.model.get_input_embeddings().weight)
        # A token without a row, such as one to pad with, is never read.
        num_tokens = max(row for row in gem.tokenizer.get_vocab().values() if row < num_rows) + 1
        # Bytes and spaces are written otherwise; names of special tokens are not.
        added = gem.tokenizer.added_tokens_decoder.items()
        special = {str(token): row for row, token in added if token.special and row < num_rows}
        special[gem.gem_tokens.names[0]] = gem.gem_tokens.row_ids[0]
        differing = [name for name, row in special.items() if row >= len(tokens) or tokens[row] != name]
        if differing or len(tokens) < num_tokens:
            raise ValueError(
                f"{self.path} has another vocabulary than the adapter's base: {len(tokens)} tokens where that has "
                f"{num_tokens}{f', and others for {differing[:5]}' if differing else ''}."
            )

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Raise if the file's weight is not this one, but for the error of how it is quantised."""
        tensor = self.tensors[f"{name}.weight"]
        ours = self.permute(name, weight.detach().float().cpu().numpy())
        if tuple(reversed(tensor.shape.tolist())) != ours.shape:
            raise ValueError(f"{name} of {self.path} is of shape {tensor.shape[::-1]}, and of the base's {ours.shape}.")
        rows = np.linspace(0, len(ours) - 1, min(NUM_ROWS, len(ours))).round().astype(int)
        theirs = self.gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        num_values, num_bytes = self.gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        bits = min(8, 8 * num_bytes // num_values)
        limit = 2 * ERROR_OF_BIT / (2**bits - 1)
        error = np.linalg.norm(theirs - ours[rows]) / np.linalg.norm(ours[rows])
        if not error <= limit:
            raise ValueError(
                f"{name} of {self.path} is not the weight that the adapter was trained beside: it differs by "
                f"{error:.1%}, where {tensor.tensor_type.name} explains {limit:.1%}. Train beside this file, or take "
                "the GGUF of the adapter's own base."
            )


USE = """## Use with llama.cpp

`{adapter}` goes beside `{base}` (SHA-256 `{sha256}`), which stays as it is: one server answers as before, and embeds.

```bash
llama-server -m {base} --lora {adapter} --embeddings --pooling cls -np 1 -b {longest} -ub {longest}{window}
curl localhost:8080/v1/embeddings -d '{{"input": "The train to the city is late.{end}"}}'
curl localhost:8080/v1/chat/completions -d '{{"messages": [{{"role": "user", "content": "Where is the train?"}}]}}'
```

```python
import json

import numpy as np
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8080/v1", api_key="-")


def embed(texts):
    rows = client.embeddings.create(model="-", input=[text + "{end}" for text in texts]).data
    return np.array([row.embedding for row in rows])


known = json.load(open("{vectors}"))
expected = np.array(known["vectors"])
cosines = (embed(known["texts"]) * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
assert cosines.min() > 0.98, f"These are not the vectors of this model: {{cosines}}"
```

- **Every text ends in `{end}`**, the GEM token twice. Without it the vector is the base's, which is not of this model,
  and the server says nothing. `-b` and `-ub` have to hold the longest text: the server cuts none, as Python does from
  {cut} tokens on.
- Why twice, and `--pooling cls`: up to now llama.cpp's server has such an adapter act from one token too early. The
  first of the two is then where it has to begin, and `cls` takes its state; the second has no influence on it.
- Why `-np 1`: with more slots, of texts that are embedded at the same time one may get a wrong vector.
- **Run the lines above after each update of llama.cpp.** Once it has been mended they will fail: then end texts in one
  `{token}`, use `--pooling last`, and run them again.
{about_window}- Answers are the base's as long as no message spells `{token}`. Where one may, send chat requests
  with `"lora": [{{"id": 0, "scale": 0}}]`.
- Ollama's `ADAPTER` line is not for this file: it puts an adapter on every token, so that answers change, and vectors
  are wrong.
- `{vectors}` holds texts and their vectors without any prompt, as computed in {dtype}.
{prompts}
"""


ABOUT_WINDOW = """- Why `--swa-full`: the base has a sliding window. Without it llama.cpp's server may answer otherwise
  after it has embedded, with an adapter or without.
"""

TEXTS = [*REFERENCE_TEXTS, "Train", "Late."]
"""With texts of one word, whose vectors differ most if the adapter acts on their last token."""


def save_activated(model: SentenceTransformer, base_file: Path, folder: Path) -> None:
    """Write the adapter, the model's card with how it is used, and vectors to compare with.

    Args:
        model: A model that :func:`check_activated` lets pass.
        base_file: The GGUF file that the adapter will be used with.
        folder: Where to write.
    """
    gem = require_gem(model)
    base = write_adapter(gem, base_file, folder)
    has_window = bool(base.read(f"{base.architecture}.attention.sliding_window"))
    token, dtype = gem.gem_tokens.names[0], str(gem.model.dtype).removeprefix("torch.")
    always = {model.default_prompt_name: ", as Python does unless told otherwise"}
    prompts = [
        f"- Prompt `{name}`: put {text!r} before the text{always.get(name, '')}."
        for name, text in model.prompts.items()
        if text
    ]
    use = USE.format(
        adapter=ADAPTER_FILE,
        base=base_file.name,
        sha256=hash_file(base_file),
        cut=gem.max_seq_length,
        window=" --swa-full" if has_window else "",
        about_window=ABOUT_WINDOW if has_window else "",
        longest=max(gem.max_seq_length - 1 + NUM_SENT, 512),
        token=token,
        end=token * NUM_SENT,
        vectors=VECTORS_FILE,
        dtype=dtype,
        prompts="\n".join(prompts),
    )
    card = render_card(model)
    (folder / CARD).write_text(card.replace("## Use\n", f"{use}\n## Use in Python\n", 1), encoding="utf-8")
    places = gem.max_seq_length - gem.num_gem_tokens
    texts = [text for text, ids in zip(TEXTS, gem.base.text.encode(TEXTS), strict=True) if len(ids) <= places]
    vectors = model.encode(texts, prompt="", show_progress_bar=False).tolist()
    write_json(folder / VECTORS_FILE, {"texts": texts, "end": token * NUM_SENT, "vectors": vectors})


def write_adapter(gem: Any, base_file: Path, folder: Path) -> GgufBase:
    """Write :data:`ADAPTER_FILE` for one GGUF file of the base, which is given back.

    Args:
        gem: A model that :func:`check_activated` lets pass.
        base_file: The GGUF file that the adapter will be used with.
        folder: Where to write.

    Raises:
        ValueError: If the file is of another base, or of a kind that llama.cpp stores in a way that is not known.
    """
    base = GgufBase(base_file, gem.model)
    base.check_vocabulary(gem)
    products, adapter = {*products_in(gem.model, gem.gem_model)}, active_adapter(gem.gem_model)
    layers = {name: module for name, module in gem.gem_model.named_modules() if module in products}
    ratios = {layer.scaling[adapter] * layer.r[adapter] for layer in layers.values()}
    if len(ratios) != 1:
        raise ValueError(f"llama.cpp knows one lora_alpha for all layers, and this adapter has {sorted(ratios)}.")
    writer = base.gguf.GGUFWriter(folder / ADAPTER_FILE, base.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ratios.pop())
    kinds = base.gguf.GGUFValueType
    writer.add_key_value("adapter.alora.invocation_tokens", gem.gem_tokens.row_ids, kinds.ARRAY, kinds.UINT32)
    for path, layer in layers.items():
        name = base.name_of(path)
        base.check_weight(name, layer.base_layer.weight)
        first, second = (part[adapter].weight.detach().float().cpu().numpy() for part in (layer.lora_A, layer.lora_B))
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(first))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(base.permute(name, second)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return base
