"""Runs real vLLM on each of several settings and prints what it serves, as JSON.

A program of its own: vLLM wants a main module that it can import in its workers, and a process
that it does not share. On one rank everything runs in this process, so that several models can
be loaded after one start. Usage: ``python probe.py '[{"model": ..., ...}, ...]'``. A setting with
``"may_fail"`` gives ``{"error": ...}`` when vLLM does not start with it; put it last.
"""

import gc
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

SAMPLING = {"temperature": 0.0, "max_tokens": 8, "logprobs": 3, "detokenize": False}
COMMON = {
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}
#: Fused with others, of which some have been handed over by then.
BREAKS_AT = "model.layers.1.self_attn.q_proj.weight"
PROMPTS = [[1, 5, 9, 200, 17], [3, 4, 5, 6, 7, 8, 9, 10, 11]]


def served_weights(worker):
    """Digest of every weight of the model that this rank serves."""
    return weights_of(worker.model_runner.get_model())


def draft_weights(worker):
    """The same of the draft model beside it; none where there is no such model."""
    draft = getattr(getattr(worker.model_runner, "drafter", None), "model", None)
    return weights_of(draft) if draft is not None else {}


def weights_of(model):
    """Digest of every weight.

    On the CPU linear layers are packed and their ``weight`` is left empty, so a digest of the
    parameters would prove nothing: an identity matrix sent through the packed layer gives its
    weight back, exactly.
    """
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    def digest(tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            found[name] = digest(parameter)
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and module.weight.numel() == 0:
            width = getattr(module, "input_size_per_partition", module.input_size)
            identity = torch.eye(width, dtype=module.params_dtype)
            found[name + ".weight"] = digest(module.quant_method.apply(module, identity))
    return found


def told(outputs):
    """Tokens and logprobs."""
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [
            [{str(t): lp.logprob for t, lp in step.items()} for step in o.outputs[0].logprobs]
            for o in outputs
        ],
    }


def reload(worker, **options):
    worker.model_runner.reload_weights(**options)


def still_open(_):
    """Files of weights that this process has open."""
    found = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return [path for path in found if path.endswith((".safetensors", ".bin"))]


def reload_that_breaks_off(llm, path):
    """A byte of the vector flips, a reload breaks off at it, and the byte is put back."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    begins, _ = json.loads(content[8 : 8 + size])[BREAKS_AT]["data_offsets"]
    damaged = bytearray(content)
    damaged[8 + size + begins] ^= 1
    path.write_bytes(damaged)
    seen = {"error": refusal(llm.collective_rpc, reload)}
    path.write_bytes(content)
    seen["status"] = llm.collective_rpc("enchtable", args=("status", {}))[0]
    seen["swap"] = refused_swap(llm)
    return seen


def refusal(attempt, *arguments, **options):
    try:
        attempt(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def swap(llm, name):
    """What the API server tells the ranks to do, one command after the other."""

    def call(command, **arguments):
        answers = llm.collective_rpc("enchtable", args=(command, {"owner": "probe", **arguments}))
        assert all(answer["ok"] for answer in answers), answers
        return answers

    call("begin")
    call("stage", safety_vector=name)
    while not all(answer["staged"] for answer in call("poll")):
        time.sleep(0.01)
    for command, arguments in (("commit", {}), ("publish", {"persisted_before": None})):
        call(command, **arguments)
    call("finish", record=None)
    llm.reset_prefix_cache()


def refused_swap(llm):
    """Why no vector at all may be swapped in; nothing is changed."""

    def call(command, **arguments):
        return llm.collective_rpc("enchtable", args=(command, {"owner": "probe", **arguments}))[0]

    call("begin")
    answer = call("stage", safety_vector="@none")
    while answer["ok"] and not answer.get("staged"):
        time.sleep(0.01)
        answer = call("poll")
    call("finish", record=None)
    return answer


def make_scannable():
    """Let vLLM 0.32 start twice in one process beside llvmlite.

    Each start reads ``__dict__`` of everything in every module, to replace Triton kernels, and
    llvmlite's library object answers to that name, as to any other, with a foreign function.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}


def replace_when_prepared(path):
    """Put another file in the place of a checked one before vLLM opens it: a race, lost."""
    from enchtable_vllm.serving import loader

    def then_replace(*arguments, **options):
        loader.prepare = prepare
        prepared = prepare(*arguments, **options)
        shutil.copyfile(path, path.with_name("other"))
        path.with_name("other").replace(path)
        return prepared

    prepare, loader.prepare = loader.prepare, then_replace


def run(setting):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    make_scannable()
    gc.freeze()  # vLLM collects garbage eight times a start, through all that is imported
    reloads = setting.pop("reload", False)
    weights_only = setting.pop("weights_only", False)
    swaps = setting.pop("swaps", [])
    breaks_off = setting.pop("breaks_off", "")
    another = setting.pop("another", "")
    refuses_swaps = setting.pop("refuses_swaps", False)
    adapter = setting.pop("adapter", None)
    refused = setting.pop("refused", False)
    if setting.pop("replaced", False):
        replace_when_prepared(Path(setting["model"], "model.safetensors"))
    if setting.get("tensor_parallel_size", 1) == 1:
        setting["distributed_executor_backend"] = "uni"
    try:
        llm = LLM(**COMMON | setting)
    except Exception as error:
        if not refused:
            raise
        cleanup_dist_env_and_memory()
        return {"refused": f"{type(error).__name__}: {error}"}
    assert not refused, "a model that was to be refused was loaded"

    def generate(llm, lora_request=None):
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in PROMPTS],
            SamplingParams(**SAMPLING),
            use_tqdm=False,
            lora_request=lora_request,
        )
        return told(outputs)

    def look(llm):
        seen = {"weights": llm.collective_rpc(served_weights)}
        if "speculative_config" in setting:
            seen["draft"] = llm.collective_rpc(draft_weights)
        if adapter:
            seen["adapter"] = generate(llm, LoRARequest("adapter", 1, adapter))
        return seen if weights_only else seen | generate(llm)

    try:
        seen = {"first": look(llm)}
        if refuses_swaps:
            seen["refused_swap"] = refused_swap(llm)
            seen["afterwards"] = look(llm)
        if swaps:
            seen["swapped"] = []
        for name in swaps:
            swap(llm, name)
            seen["swapped"].append(look(llm))
        if breaks_off:
            seen["broke_off"] = reload_that_breaks_off(llm, Path(breaks_off))
        if another:
            from_there = {"weights_path": another}
            seen["another"] = refusal(llm.collective_rpc, reload, kwargs=from_there)
            seen["afterwards"] = look(llm)
        if reloads:
            seen["open"] = llm.collective_rpc(still_open)
            llm.collective_rpc(reload)
            llm.reset_prefix_cache()
            seen["reloaded"] = look(llm)
    finally:
        # vLLM 0.20 has a worker process even here, which would outlive this and keep its memory.
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    return seen


def attempt(setting):
    if not setting.pop("may_fail", False):
        return run(setting)
    try:
        return run(setting)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # sends `served_weights` to the workers
    results = [attempt(setting) for setting in json.loads(sys.argv[1])]
    print("\nRESULT " + json.dumps(results))
