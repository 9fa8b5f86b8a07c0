"""What can be wrong with an input: one line for each way.

A new format adds a line or a loop here and nothing else: each damage goes through every
consumer of the artefact that it is done to (`consumers.CONSUMERS`).
"""

from __future__ import annotations

from corpus.damage import Damage
from corpus.damaged_files import configs, json_files, weight_files
from corpus.damaged_forms import forms
from corpus.damaged_plans import plan_numbers, plan_words
from corpus.damaged_vectors import tensors, vector_files, vector_numbers

#: Whole files that hold what they should not, and what only some forms of a family have.
VECTOR_CONTENTS: tuple[Damage, ...] = (*tensors(), *vector_files(), *forms())
DAMAGES: tuple[Damage, ...] = (
    *weight_files(),
    *configs(),
    *json_files(),
    *vector_numbers(),
    *plan_numbers(),
    *plan_words(),
    *VECTOR_CONTENTS,
)
