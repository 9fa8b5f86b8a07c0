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


def widen(model):
    """Store in fp32 what was rounded to bf16."""
    path = model / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


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
    transfer = {"weight_transfer_config": {"backend": "nccl"}}
    settings.append({"model": str(family.task), "refused": True, **ours, **transfer})
    folder = tmp_path_factory.mktemp("wide")
    wide = models.make_family(models.tiny_llama(folder / "aligned"), folder, store=widen)
    small = {"model_loader_extra_config": {"beta": 1e-8}}
    settings.append({"model": str(wide.task), "refused": True, **ours, **small})
    settings.append({"model": str(wide.task), "dtype": "float32", **ours, **small})
    results, printed = probe(settings, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    names = [*DAMAGES, "nothing", "replaced", "unsigned", "transfer", "wide", "wide in fp32"]
    return dict(zip(names, results, strict=True)), printed


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


@pytest.mark.refuses("weights that a trainer sends (`--weight-transfer-config`)")
def test_weights_that_would_come_by_another_way(seen):
    results, _ = seen
    assert "ConfigError: --weight-transfer-config" in results["transfer"]["refused"]


@pytest.mark.refuses("an addition that the dtype of serving rounds away")
def test_an_addition_that_only_the_files_precision_keeps(seen):
    """Stored in fp32, served in bf16: every weight would be the unmerged one."""
    results, _ = seen
    assert (
        "none that does, at beta 1e-08 and served in torch.bfloat16" in results["wide"]["refused"]
    )
    assert results["wide in fp32"]["first"]["tokens"]


def test_the_same_process_serves_what_is_good(seen):
    results, printed = seen
    assert results["nothing"]["first"]["tokens"]
    # And not for the file that was replaced; the other is the one in fp32.
    assert printed.count("safety vector merged: ") == 2
