"""What a model can do, in the three domains of the method's paper: code, mathematics, medicine.

Each module reads its problems, asks them, and marks the answers: `humaneval`, `gsm8k`, `medmcqa`.
"""

from enchtable_vllm.evaluate.utility.choose import UTILITIES, read_utility
from enchtable_vllm.evaluate.utility.problems import Problem, ProblemSet

__all__ = ["UTILITIES", "Problem", "ProblemSet", "read_utility"]
