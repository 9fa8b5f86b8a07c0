"""The server under test: its model's name, and what it says that it serves."""

from __future__ import annotations

from enchtable_vllm.evaluate.faults import EvaluationError
from enchtable_vllm.evaluate.report import ServedNow
from enchtable_vllm.fleet.client import Client, ServerRefused


async def model_name(client: Client, wanted: str | None) -> str:
    """The name to ask for: the wanted one, or the first that is served."""
    return wanted if wanted is not None else await client.model()


async def served_now(client: Client) -> tuple[ServedNow | None, int | None]:
    """What is served, and the server's count of swaps; None of a server that is not ours.

    Raises:
        EvaluationError: It is in the middle of a swap, or not ready.
        ServerRefused, Unreachable: It does not say.
    """
    try:
        status = await client.status()
    except ServerRefused as refused:
        if refused.status == 404:  # any OpenAI-compatible server can be evaluated
            return None, None
        raise
    if status.state != "serving" or not status.ready:
        raise EvaluationError(
            f"server {client.target.url}",
            expected="one that serves, ready",
            got=f"state '{status.state}', {status.reason or 'not ready'}",
            fix="See 'enchtable status', then run the same command again.",
        )
    active = status.active
    served = ServedNow(
        safety_vector=active.safety_vector,
        beta=active.beta,
        weight_version=status.weight_version,
        task_model=status.task_model.fingerprint,
    )
    return served, status.epoch
