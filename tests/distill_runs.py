"""Distillations of a tiny model, as tests run them."""

import json

from transformers import TrainerCallback

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.distill.run import distil

BRIEF = {
    "epochs": 2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 1e-3,
    "max_length": 200,
    "eval_share": 0.2,
    "save_steps": 4,
}


def run(aligned, pairs, out, *, say=lambda _: None, callbacks=(), dtype="fp32", **options):
    settings = {k: options.pop(k) for k in list(options) if k in Recipe.__dataclass_fields__}
    return distil(
        locate(aligned),
        pairs,
        out,
        Recipe(**{**BRIEF, **settings}),
        say=say,
        callbacks=callbacks,
        dtype=dtype,
        **options,
    )


def as_json(report):
    return json.loads(json.dumps(report.to_json()))


class Interrupt(TrainerCallback):
    """As Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt
