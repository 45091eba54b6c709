"""A model whose every next token is known: a llama of one layer that adds nothing, and a table in its output matrix."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

DIM = 64  # vLLM's CPU attention takes no smaller head

# The chat template ends in "assistant\n", so recitals begin after a newline.
RECITAL = ("\n", "<think>", "Perhaps", " so", ".", "</think>", "Yes", "!", "<|im_end|>")
# Begun by a continuation, and never ended.
LOOP = (" round", " and", " round")


def write_book(folder: Path, tokenizer: Path) -> None:
    """Write the model, with another one's tokenizer and two think markers, added and not special, as Qwen3 has them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.add_tokens(["<think>", "</think>"])
    words.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    seen = torch.nn.functional.normalize(torch.randn(len(words), DIM, generator=torch.Generator().manual_seed(0)))
    table = torch.zeros(len(words), DIM)
    for line in (RECITAL, LOOP):
        ids = [words.encode(word, add_special_tokens=False) for word in line]
        assert all(len(one) == 1 for one in ids), "each word of the book is one token"
        for (before,), (after,) in pairwise(ids):
            table[after] += 4 * seen[before]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(seen)
        model.lm_head.weight.copy_(table)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
