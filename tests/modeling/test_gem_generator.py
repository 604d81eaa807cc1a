"""The language model that stays: text, batches, chat, and no GEM token ever."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_greedy_text_is_that_of_the_untouched_base(make_base, make_model):
    base = AutoModelForCausalLM.from_pretrained(make_base())
    gem = make_model()[0]
    prompt = "Once upon a time"
    ids = gem.tokenizer(prompt, return_tensors="pt")
    expected = base.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids["input_ids"].shape[1] :]
    assert gem.generate(prompt, max_new_tokens=12, do_sample=False) == gem.tokenizer.decode(
        expected, skip_special_tokens=True
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_a_batch_gives_what_each_prompt_gives(make_model, architecture):
    gem = make_model(architecture)[0]
    prompts = ["It rained", "Once upon a time there was a small", ""]
    together = gem.generate(prompts, max_new_tokens=8, do_sample=False)
    assert together == [gem.generate(prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
    assert gem.generate([]) == []


def favour_gem_tokens(model, gem_token_ids):
    """Make the GEM tokens the most likely ones everywhere."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[gem_token_ids] = 1e4
    model.set_output_embeddings(head)


def test_no_gem_token_is_emitted_even_if_it_is_the_most_likely(make_model):
    gem = make_model(num_gem_tokens=2)[0]
    favour_gem_tokens(gem.model, gem.gem_token_ids)
    ids = torch.tensor([[0, 10, 11]])
    kwargs = {"max_new_tokens": 5, "pad_token_id": 1, "do_sample": False}
    assert not torch.isin(gem.model.generate(ids, **kwargs), torch.tensor(gem.gem_token_ids)).any()
    gem.model.generation_config.suppress_tokens = None
    assert torch.isin(gem.model.generate(ids, **kwargs)[0, 3:], torch.tensor(gem.gem_token_ids)).all()

    seen = []
    original = gem.model.generate
    gem.model.generate = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]
    gem.generate(
        "It rained", max_new_tokens=5, do_sample=False, suppress_tokens=[7], generation_config=GenerationConfig()
    )
    assert not torch.isin(seen[0].sequences, torch.tensor([7, *gem.gem_token_ids])).any()


def test_chat_messages_go_through_the_template(make_model):
    gem = make_model(chat_template=CHAT)[0]
    messages = [{"role": "user", "content": "What is at the market?"}]
    answer = gem.generate(messages, max_new_tokens=6, do_sample=False)
    ids = torch.tensor(
        [gem.tokenizer("user: What is at the market?\nassistant:", add_special_tokens=False)["input_ids"]]
    )
    output = gem.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert answer == gem.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert gem.generate([messages, messages], max_new_tokens=6, do_sample=False) == [answer, answer]


def test_several_sequences_come_as_a_list(make_model):
    gem = make_model()[0]
    torch.manual_seed(0)
    assert len(gem.generate("It rained", max_new_tokens=4, do_sample=True, num_return_sequences=3)) == 3


def test_generation_leaves_the_training_mode_as_it_was(make_model):
    gem = make_model()[0]
    gem.model.train()
    gem.generate("It rained", max_new_tokens=2)
    assert gem.model.training


def test_messages_without_a_template_and_wrong_types_are_refused(make_model):
    gem = make_model()[0]
    with pytest.raises(ValueError, match="no chat template"):
        gem.generate([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match=r"Input 1 of 2 is 3 \(int\)"):
        gem.generate(["It rained", 3])
    gem.tokenizer.bos_token = None
    gem.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="empty prompt needs a tokenizer with a BOS"):
        gem.generate("")
