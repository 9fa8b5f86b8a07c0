"""Training data: every row is used, counted, or named as a fault with its line."""

import gzip
import json
import os
import pickle

import pytest
import torch

from enchtable_vllm.distill.data import Pair, RowFault, read_pairs, refuse_faults, split
from enchtable_vllm.distill.encode import IGNORED, collator, encode
from enchtable_vllm.errors import CheckpointError, TrainingDataError

GOOD = {"prompt": "How do I boil rice?", "response": "Sure, here is how:"}


def file(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "empty"),
        (b"\xff{}", "not JSON"),
        pytest.param(b"[" * 100_000, "not JSON", id="nested"),
        (b'{"prompt": "a", "prompt": "b", "response": "c"}', "twice in one object"),
        (["prompt", "response"], "a JSON list, not an object"),
        ({"prompt": "x"}, "no 'response'"),
        ({"response": "x"}, "no 'prompt'"),
        ({"prompt": " ", "response": "x"}, "'prompt' is empty"),
        ({"prompt": "x", "response": ""}, "'response' is empty"),
        ({"prompt": 3, "response": "x"}, "'prompt' is no text but int"),
        ({"prompt": "x", "response": None}, "'response' is no text but NoneType"),
        (b'{"prompt": "\\ud800", "response": "x"}', "unexpected end of hex escape"),
    ],
)
def test_a_bad_row_is_a_fault_with_its_line(tmp_path, row, reason):
    read = read_pairs(file(tmp_path, GOOD, row, {**GOOD, "prompt": "another"}))
    assert [pair.line for pair in read.pairs] == [1, 3]
    (fault,) = read.faults
    assert fault.line == 2
    assert reason in fault.reason


def test_all_faults_are_raised_at_once_and_survive_a_process_border(tmp_path):
    read = read_pairs(file(tmp_path, GOOD, *[b"nonsense"] * 9, GOOD))
    with pytest.raises(TrainingDataError) as caught:
        refuse_faults(read, [RowFault(1, "too long")])
    assert len(caught.value.faults) == 11
    assert caught.value.faults[0] == "line 1: too long"
    assert caught.value.faults[-1] == "line 11: the same as line 1"
    assert "11 fault(s): line 1" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).faults == caught.value.faults


def test_repeated_rows_are_left_out_and_counted_only_where_asked(tmp_path):
    path = file(tmp_path, GOOD, GOOD, {**GOOD, "response": "Yes:"})
    assert [str(f) for f in read_pairs(path).faults] == ["line 2: the same as line 1"]
    read = read_pairs(path, drop_duplicates=True)
    assert (len(read.pairs), read.duplicates, read.faults) == (2, 1, ())


def test_of_the_beavertails_layout_the_unsafe_rows_are_taken_and_counted(tmp_path):
    rows = [
        {**GOOD, "prompt": str(i), "is_safe": i % 3 == 0, "category": {"x": True}}
        for i in range(10)
    ]
    read = read_pairs(file(tmp_path, *rows))
    assert [pair.prompt for pair in read.pairs] == ["1", "2", "4", "5", "7", "8"]
    assert read.counts()["left_out_safe"] == 4
    assert read.rows == 10


@pytest.mark.parametrize(
    ("label", "reason"), [({}, "no 'is_safe'"), ({"is_safe": "no"}, "neither true nor false")]
)
def test_labels_must_be_there_throughout_and_be_truth_values(tmp_path, label, reason):
    read = read_pairs(file(tmp_path, {**GOOD, "is_safe": False}, {**GOOD, "prompt": "x", **label}))
    (fault,) = read.faults
    assert reason in fault.reason


def test_a_packed_file_is_read_and_what_is_no_file_is_refused(tmp_path):
    row = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(row)
    assert len(read_pairs(tmp_path / "pairs.jsonl.gz").pairs) == 1
    (tmp_path / "cut.gz").write_bytes((tmp_path / "pairs.jsonl.gz").read_bytes()[:-9])
    os.mkfifo(tmp_path / "fifo")
    for name in ("cut.gz", "fifo", "none"):
        with pytest.raises(TrainingDataError, match="a file that can be read"):
            read_pairs(tmp_path / name)


def test_nothing_to_train_on_is_refused(tmp_path):
    for rows in ([], [{**GOOD, "is_safe": True}]):
        with pytest.raises(TrainingDataError, match="at least one pair"):
            refuse_faults(read_pairs(file(tmp_path, *rows)))
    with pytest.raises(TrainingDataError, match="can be read"):
        read_pairs(tmp_path / "missing.jsonl")


def test_a_prompt_is_never_on_both_sides_of_the_split():
    pairs = [Pair(i, f"prompt {i % 20}", f"response {i}") for i in range(100)]
    training, held_out = split(pairs, count=1000, eval_share=0.2, seed=3)
    assert len(held_out) == 20
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}
    assert (training, held_out) == split(pairs, count=1000, eval_share=0.2, seed=3)
    assert training != split(pairs, count=1000, eval_share=0.2, seed=4)[0]


def test_the_papers_thousand_pairs_train_beside_those_held_out():
    pairs = [Pair(i, str(i), "x") for i in range(5000)]
    training, held_out = split(pairs, count=1000, eval_share=0.05, seed=0)
    assert (len(training), len(held_out)) == (1000, 53)
    training, held_out = split(pairs, count=1000, eval_share=0, seed=0)
    assert (len(training), held_out) == (1000, [])


def test_only_the_answer_and_its_end_of_turn_are_learned(tokenizer):
    pair = Pair(1, "How many?", "Sure, here is how:")
    (example,), faults = encode(tokenizer, [pair], max_length=200)
    assert not faults
    whole = tokenizer.decode(example["input_ids"])
    assert whole == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nSure, here is how:<|im_end|>"
    )
    answer = tokenizer.decode(example["input_ids"][-example["answer_length"] :])
    assert answer == "Sure, here is how:<|im_end|>"


def test_a_pair_that_does_not_fit_is_a_fault_not_a_cut(tokenizer):
    pairs = [Pair(1, "short", "Sure:"), Pair(7, "long " * 50, "Sure:")]
    examples, faults = encode(tokenizer, pairs, max_length=100)
    assert len(examples) == 1
    assert [(f.line, f.reason) for f in faults] == [(7, "275 tokens, more than 100")]


def test_templates_that_cannot_be_told_apart_are_refused(tokenizer):
    kept = tokenizer.chat_template
    pair = [Pair(4, "a", "b")]
    try:
        for template, message in (
            (None, "a chat template"),
            ("{{ raise_exception('no') }}", "line 4"),
            ("{{ messages | length }} {{ messages[-1]['content'] }}", "does not follow"),
        ):
            tokenizer.chat_template = template
            with pytest.raises(CheckpointError, match=message):
                encode(tokenizer, pair, max_length=100)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
        tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}{% endfor %}" + (
            "{% if add_generation_prompt %}[{% endif %}"
        )
        (example,), _ = encode(tokenizer, pair, max_length=100)  # no end of turn: the tokenizer's
        assert tokenizer.decode(example["input_ids"]) == "[a[b</s>"
    finally:
        tokenizer.chat_template = kept


def test_a_batch_has_the_loss_of_its_pairs_one_by_one(aligned, tokenizer):
    """Padding, and logits left out before the first answer, change nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float64).eval()
    pairs = [Pair(1, "a", "Sure, b:"), Pair(2, "a much longer question", "Yes:"), Pair(3, "c", "d")]
    examples, _ = encode(tokenizer, pairs, max_length=100)
    batch = collator(model, tokenizer)(examples)
    assert 0 < batch["logits_to_keep"] < batch["input_ids"].shape[1]
    learned = [[int(t) for t in row if t != IGNORED] for row in batch["labels"]]
    assert learned == [e["input_ids"][-e["answer_length"] :] for e in examples]
    total = tokens = 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            labels = ids.clone()
            labels[0, : -example["answer_length"]] = IGNORED
            total += model(input_ids=ids, labels=labels).loss * example["answer_length"]
            tokens += example["answer_length"]
        loss = model(**batch).loss
    torch.testing.assert_close(loss, total / tokens, rtol=1e-6, atol=0)
