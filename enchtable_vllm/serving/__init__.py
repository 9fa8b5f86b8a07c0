"""vLLM's side: the load format ``enchtable``. The only package here that imports vllm.

Importing it has no side effect and brings in neither torch nor vllm; vLLM calls
`registration.register` in every one of its processes.
"""
