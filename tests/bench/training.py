"""Does trl take an export? `python -m tests.bench.training SFT.jsonl RL.jsonl`, after `pip install trl math-verify`.

Says which of trl's own chat templates keep the thinking of an export's completions (give one of `--thinking field` to
see the other way), and trains a model of random weights for a step with SFTTrainer and for one with GRPOTrainer.
Nothing is loaded from elsewhere; no part of the tests, since trl is no dependency.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

WORDS = 2048  # in the tokenizer


def tokenizer(text: str, template: str) -> Any:
    """A tokenizer of an export's own words, with the marks that most templates write."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    words.train_from_iterator([text], trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token=special[0], bos_token=special[0]
    )
    found.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    found.chat_template = template
    return found


def keeps(row: dict[str, Any], words: Any) -> str:
    """What becomes of a completion's thinking and of its prompt under a chat template."""
    from trl.data_utils import maybe_apply_chat_template

    turn = row["completion"][0]
    thinking, _, answer = turn["content"].rpartition("</think>")
    thinking = turn.get("reasoning_content") or thinking.partition("<think>")[2]
    text = maybe_apply_chat_template({name: row[name] for name in ("prompt", "completion")}, words)
    whole = text["prompt"] + text["completion"]
    if any(message["content"] not in whole for message in row["prompt"]) or answer.strip() not in whole:
        return "changes the prompt or the answer"
    if whole.count(thinking) != 1:
        return "drops the thinking"
    return "keeps it" if text["completion"].count("</think>") < 2 else "ends the thinking twice"


def main() -> None:
    """Print what trl makes of two exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", type=Path)
    parser.add_argument("rl", type=Path)
    arguments = parser.parse_args()

    import trl
    from datasets import load_dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl.data_utils import is_conversational
    from trl.rewards import accuracy_reward

    text = arguments.sft.read_text()
    row = next(row for row in map(json.loads, text.split("\n")) if len(row["prompt"]) == 1 and row["tools"] == "null")
    folder = Path(trl.__file__).parent / "chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        try:
            found = keeps(row, tokenizer(text[:100_000], path.read_text()))
        except Exception as error:  # a template for images, or one that wants what this tokenizer lacks
            found = f"{type(error).__name__}: {error}"[:80]
        print(f"{path.stem:34} {found}")

    words = tokenizer(text, (folder / "qwen3.jinja").read_text())
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(words), max_position_embeddings=1 << 16, **size, **heads)
    data = {
        form: load_dataset("json", data_files=str(getattr(arguments, form)), split="train") for form in ("sft", "rl")
    }
    assert all(is_conversational(row) for rows in data.values() for row in rows)
    with tempfile.TemporaryDirectory() as out:
        usual: dict[str, Any] = {"output_dir": out, "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
        usual |= {"save_strategy": "no", "per_device_train_batch_size": 2}
        sft = trl.SFTTrainer(
            model=Qwen3ForCausalLM(config),
            args=trl.SFTConfig(max_length=None, **usual),
            train_dataset=data["sft"],
            processing_class=words,
        )
        print("SFTTrainer: loss", sft.train().training_loss)
        first = sft.train_dataset[0]
        print("learned:", words.decode([label for label in first["labels"] if label != -100])[:300])
        grpo = trl.GRPOTrainer(
            model=Qwen3ForCausalLM(config),
            reward_funcs=accuracy_reward,
            args=trl.GRPOConfig(num_generations=2, max_completion_length=8, **usual),
            train_dataset=data["rl"].rename_column("answer", "solution"),
            processing_class=words,
        )
        print("GRPOTrainer: loss", grpo.train().training_loss)


if __name__ == "__main__":
    main()
