"""A fleet of servers: asked, swapped one after the other, checked, and brought back.

The client half of `docs/http-api.md`; neither torch nor vllm is imported. Read in this order:
`documents` (what servers say), `client` (one server), `exchange` (one server's swap, and the way
back, whatever the network does), `preflight` and `checks` (before and after a step), `journal`
(what survives a crash), `rollout` (all of it in order).
"""

from enchtable_vllm.fleet.client import Client, ServerRefused, Unreachable
from enchtable_vllm.fleet.credentials import Credentials, Secret
from enchtable_vllm.fleet.targets import Target

__all__ = ["Client", "Credentials", "Secret", "ServerRefused", "Target", "Unreachable"]
