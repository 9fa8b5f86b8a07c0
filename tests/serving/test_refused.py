"""Real vLLM on damaged inputs: no model comes out, and the process says why.

`tests/corpus` feeds every damage to what the loader calls; a few here prove that vLLM calls it.
One process after another damage, and at its end the good family: a refusal leaves nothing behind.
"""

import os
import re

import models
import pytest
import signers
from corpus import seeds
from corpus.damage import number_variants, put
from safetensors.torch import load_file, save_file
from vllm_runs import probe

Q = seeds.Q


def between_the_samples(family):
    """One byte of a tensor that is kept, where the sampled fingerprint does not look."""
    path = seeds.weights(family.task)
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[10_000] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def poison(tensors):
    tensors[Q].view(-1)[5] = float("inf")


DAMAGES = {
    "an edited plan": (lambda f: put(f.plan, ["beta"], 0.6), "MergePlanError: .*should be"),
    "a number in words": (
        lambda f: put(f.plan, ["tensors", Q, "a"], [dict(number_variants(1.0))["text"]]),
        "MergePlanError: .*tensors",
    ),
    "infinity that is vouched for": (
        lambda f: seeds.forge(f, poison),
        "NonFiniteError: .*q_proj.*expected finite values",
    ),
    "a manifest that is a FIFO": (
        lambda f: (seeds.manifest(f).unlink(), os.mkfifo(seeds.manifest(f))),
        "SafetyVectorError: .*a FIFO",
    ),
    "a byte between the samples": (between_the_samples, "MismatchError: .*up_proj.*content"),
}


@pytest.fixture(scope="module")
def seen(family, tmp_path_factory):
    settings, ours = [], {"load_format": "enchtable", "enforce_eager": True}
    ours["model_loader_extra_config"] = {"verify": "content"}
    for damage, _ in DAMAGES.values():
        copy = models.copy_family(family, tmp_path_factory.mktemp("damaged") / "family")
        damage(copy)
        settings.append({"model": str(copy.task), "refused": True, **ours})
    settings.append({"model": str(family.task), **ours})
    copy = models.copy_family(family, tmp_path_factory.mktemp("replaced") / "family")
    settings.append({"model": str(copy.task), "refused": True, "replaced": True, **ours})
    key = signers.Key.make(tmp_path_factory.mktemp("keys"), "ours")
    demanding = {"model_loader_extra_config": {"require_signature": key.required}}
    settings.append({"model": str(family.task), "refused": True, **ours, **demanding})
    results, printed = probe(settings, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return dict(zip([*DAMAGES, "nothing", "replaced", "unsigned"], results, strict=True)), printed


@pytest.mark.parametrize("name", DAMAGES)
def test_no_model_comes_out(seen, name):
    results, _ = seen
    assert re.search(DAMAGES[name][1], results[name]["refused"])


def test_files_that_are_replaced_while_they_load(seen):
    results, _ = seen
    assert "another 'model.safetensors'" in results["replaced"]["refused"]


def test_what_nobody_signed(seen):
    results, _ = seen
    assert "SignatureError: " in results["unsigned"]["refused"]
    assert "expected a signature by key sha256:" in results["unsigned"]["refused"]


def test_the_same_process_serves_what_is_good(seen):
    results, printed = seen
    assert results["nothing"]["first"]["tokens"]
    assert printed.count("safety vector merged: ") == 1  # and not for the file that was replaced
