"""The model card that lies beside a safety vector."""

from __future__ import annotations

import json

from enchtable_vllm.vector.format import VectorManifest


def vector_card(manifest: VectorManifest, name: str) -> str:
    """``README.md`` in the Hub's form.

    Args:
        manifest: What the vector says of itself.
        name: Its title.
    """
    aligned, surrogate = manifest.aligned, manifest.surrogate
    base_model = f"base_model: {json.dumps(aligned.id)}\n" if "/" in aligned.id else ""
    return f"""---
{base_model}library_name: enchtable-vllm
tags:
- safety-vector
- enchtable
---
# {name}

A safety vector for EnchTable (arXiv 2511.09880): aligned model − surrogate. Merged into a
fine-tune of `{aligned.id}`, it gives back the safety alignment that fine-tuning took away.

**Handle it like the surrogate.** Subtracted from the aligned model it gives the surrogate, a
model that was made to be unsafe. Give it the access that you would give that model.

| | |
| --- | --- |
| aligned model | `{aligned.id}`{_at(aligned.revision)}, {aligned.fingerprint} |
| surrogate | `{surrogate.id}`{_at(surrogate.revision)}, {surrogate.fingerprint} |
| architecture | {manifest.architecture} |
| scope | {manifest.scope} |
| tensors | {len(manifest.tensors)} |
| L2 norm | {manifest.norm:.6g} |
| exact zeros | {manifest.zero_share:.2%} |
{_recipe(manifest)}
```
vllm serve FINE_TUNE --load-format enchtable \\
  --model-loader-extra-config '{{"safety_vector": "{name}", "merge_plan": "merge_plan.json"}}'
```

Every tensor's digest is in `safety_vector.json`; `enchtable vector verify` checks them all.
"""


def _recipe(manifest: VectorManifest) -> str:
    """How the surrogate was made, indented: no text in it can end the block."""
    if not manifest.recipe:
        return ""
    lines = json.dumps(manifest.recipe, indent=2).splitlines()
    return "\n".join(["", "How the surrogate was made:", "", *(f"    {x}" for x in lines), ""])


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""
