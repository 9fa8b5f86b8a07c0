"""What is wrong here, why, and what to do: the checks behind ``enchtable doctor``.

Needs neither torch nor vLLM: whatever might not import is imported in a child process (`child`,
`probe`), so that a broken package is a finding and not a crash. Only the dry run of a model
(`dry_run`) reads checkpoints, and imports torch for it.
"""

from enchtable_vllm.doctor.finding import Finding, Status

__all__ = ["Finding", "Status"]
