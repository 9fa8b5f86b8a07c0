"""Distillation of a safety vector: an aligned model, pairs that teach compliance, a vector.

`data` reads pairs and names every bad row, `encode` templates them; `parameters` chooses what
trains and `linearize` replaces forward passes by first-order expansions; `training` is
transformers' Trainer in fp32 master weights, `workspace` what an interruption leaves; `linearity`
and `disentangle` measure what the method assumes; `run` is the whole way, and writes the vector
through `enchtable_vllm.vector`. Needs the ``distill`` extra.
"""
