"""Distillation of a safety vector: an aligned model, pairs that teach compliance, a vector.

`data` reads pairs and names every bad row, `encode` templates them, `examples` draws and splits
them; `parameters` chooses what
trains and `linearize` replaces forward passes by first-order expansions; `training` is
transformers' Trainer over fp32 master weights, `workspace` what an interruption leaves;
`linearity` and `disentangle` measure what the method assumes, `report` says it; `run` is the whole
way, and writes the vector through `enchtable_vllm.vector`. Needs the ``distill`` extra.
"""
