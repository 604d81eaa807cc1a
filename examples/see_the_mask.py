"""Print the GEM attention mask of a row as transformers gives it to the model, and the position ids.

python examples/see_the_mask.py --base examples/base-8m --num-gem-tokens 3
"""

from __future__ import annotations

import argparse

import torch

from gem_st import GemTransformer, gem_attention_mask
from gem_st.modeling.gem_mask import GEM, gem_position_ids, gem_segments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="examples/base-8m")
    parser.add_argument("--num-gem-tokens", type=int, default=3)
    parser.add_argument("--prefix", default="The sun rose.")
    parser.add_argument("--suffix", default=" It was day.")
    args = parser.parse_args()

    gem = GemTransformer(args.base, num_gem_tokens=args.num_gem_tokens, model_kwargs={"attn_implementation": "sdpa"})
    prefix = gem.tokenizer(args.prefix)["input_ids"]
    suffix = gem.tokenizer(args.suffix, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prefix, *gem.gem_token_ids, *suffix]])
    real = torch.ones_like(ids)
    segments = gem_segments(ids, real, gem.gem_token_ids)
    mask = gem_attention_mask(gem.model.config, segments, real, torch.float32)[0, 0]

    names = [
        f"GEM {token_id - gem.gem_token_ids[0] + 1}" if segment == GEM else repr(gem.tokenizer.decode([token_id]))
        for token_id, segment in zip(ids[0].tolist(), segments[0].tolist(), strict=True)
    ]
    width = max(map(len, names))
    print(f"{'query':>{width}}  position  keys attended to (x), in the same order")
    for name, position, row in zip(names, gem_position_ids(segments, real)[0].tolist(), mask, strict=True):
        print(f"{name:>{width}}  {position:>8}  {' '.join('x' if attended else '.' for attended in row)}")


if __name__ == "__main__":
    main()
