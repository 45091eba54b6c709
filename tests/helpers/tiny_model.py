"""A model of random weights that costs next to nothing: for what is around a model, not for what it says."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTEXT_TOKENS = 4096


def write_tiny_model(folder: Path, text: str | None = None) -> None:
    """A llama of one layer with 2,048 tokens, which never ends an answer by itself.

    Args:
        folder: Where it is written, as transformers and vLLM read it.
        text: What its tokenizer is trained on, ASCII alone; the README where None.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder, text),
        hidden_size=64,  # vLLM's CPU attention takes no smaller head
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path, text: str | None = None) -> int:
    """The tokenizer of the above, with a chat template of one line a message; how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (ROOT / "README.md").read_text() if text is None else text
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2048, show_progress=False)
    tokenizer.train_from_iterator(["".join(filter(str.isascii, text))], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT_TOKENS)
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    words.save_pretrained(folder)
    return len(words)
