"""Measuring a served model: how safe it is, what it can still do, and which β is best.

Over HTTP, of any OpenAI-compatible server; neither torch nor vllm is imported. Read in this order:
`prompts`, `sampling` and `utility` (what is asked), `refusals`, `calibration`, `guards` and
`judge` (who marks it), `jobs` (all of it, before a word is sent), `ask` (asking, by inspect-ai),
`baselines` and `safedecoding` (what to compare a merge with), `run` (one evaluation), `report`
(what comes of it), `compare` and `statistics` (several), `garak` (attacks), `tune` (one server,
many β). Comparing needs no more than the base install.
"""
