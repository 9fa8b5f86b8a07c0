"""``python -m enchtable_vllm.cli``: the same, for launchers that take a module."""

from enchtable_vllm.cli import main

main()
