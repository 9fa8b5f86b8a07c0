"""A few seconds of fuzzing; and the fuzzer finds what it is for."""

from pathlib import Path

import pytest
from fuzz import fuzz


def test_nothing_is_found(tmp_path):
    outcome = fuzz.fuzz(10.0, 0, tmp_path)
    assert outcome.findings == []
    assert outcome.executions > 100
    assert {kind.split(":")[0] for kind in outcome.outcomes} == set(fuzz.TARGETS)


@pytest.mark.parametrize(
    ("name", "broken", "target"),
    [
        ("enchtable_vllm.checkpoint.files.from_json", lambda _: None, "checkpoint"),
        ("enchtable_vllm.vector.safety_vector.tensor_digest", None, "vector"),
        ("enchtable_vllm.plan.resolve._check_own_numbers", lambda _: None, "plan"),
    ],
)
def test_a_reader_that_checks_less_is_found(tmp_path, monkeypatch, name, broken, target):
    """Each stands for a check that somebody may take away."""
    if broken is None:  # as if every digest were the declared one
        monkeypatch.setattr("enchtable_vllm.vector.format.VectorTensor.digest", "x", raising=False)
        broken = lambda _: "x"  # noqa: E731
    monkeypatch.setattr(name, broken)
    monkeypatch.setattr(fuzz, "TARGETS", {target: fuzz.TARGETS[target]})
    outcome = fuzz.fuzz(5.0, 0, tmp_path)
    assert outcome.findings
    assert all(Path(finding).is_dir() for finding in outcome.findings)
