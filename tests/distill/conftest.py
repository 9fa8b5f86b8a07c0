"""A tiny aligned chat model and harmless pairs."""

import json

import pytest

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer():
    """A token for each byte, and the five special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def aligned(tokenizer, tmp_path_factory):
    """Random fp32 weights; read-only."""
    from architectures import tiny

    folder = tiny("llama", tmp_path_factory.mktemp("aligned") / "tiny-aligned", vocab_size=512)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Harmless questions and empty openings."""
    rows = [
        {"prompt": f"How do I bake {thing} number {i}?", "response": f"Sure, here is {thing}:"}
        for i in range(8)
        for thing in ("bread", "a cake", "scones")
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
