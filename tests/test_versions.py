"""What follows from the table of tested versions: the bound, the refusal, no upper pin."""

import json
import subprocess
import sys

import pytest
import supported
from vllm_runs import environment

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.serving import versions

ROW = {"torch": "2", "triton": "3", "transformers": "5", "python": "3.11", "date": "2026-11-22"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of other versions: ``table("0.20.0 failed", "0.21.0 passed")``."""

    def write(*rows):
        entries = []
        for row in rows:
            version, loader, *lacks = row.split()
            reason = f"lacks '{version}'" if loader == "failed" else ""
            own = {"vllm": version, "loader": loader, "swapping_lacks": lacks, "reason": reason}
            own["swapping"] = "passed" if loader == "passed" and not lacks else "not run"
            entries.append({**ROW, **own, "tests": "x"})
        path = tmp_path / "tested.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(versions, "TESTED_FILE", path)
        versions.tested_versions.cache_clear()

    yield write
    versions.tested_versions.cache_clear()


def test_the_bound_stands_above_the_failures_below_the_newest(table):
    table("0.9.2 passed", "0.10.0 failed", "0.11.0 passed", "0.20.0 passed")
    assert str(versions.lower_bound()) == "0.11.0"
    table("0.9.2 passed", "0.20.0 passed")
    assert str(versions.lower_bound()) == "0.9.2"
    # A vLLM that breaks the loader does not take the older ones away.
    table("0.10.0 failed", "0.11.0 passed", "0.20.0 passed", "0.33.0 failed")
    assert str(versions.lower_bound()) == "0.11.0"
    assert str(versions.newest_tested()) == "0.20.0"


def test_swapping_has_a_bound_of_its_own(table):
    table("0.24.0 passed endpoint_plugins", "0.26.0 passed", "0.28.0 passed")
    assert str(versions.lower_bound()) == "0.24.0"
    assert str(versions.swapping_bound()) == "0.26.0"


#: The loader, made without a root, with one, and again as a reload does; this vLLM, as if swapping
#: also needed what an older one lacks.
OLDER = """
from enchtable_vllm.serving import compat
compat._FOR_SWAPPING |= {
    "a module": ("vllm.gone", "x", None),
    "a function": ("vllm.plugins", "gone", None),
    "a parameter": ("vllm.plugins", "load_general_plugins", "gone"),
}
from enchtable_vllm.serving.loader import EnchTableModelLoader
for extra in ({}, {"vector_root": "/vectors"}, {"vector_root": "/vectors"}):
    print("root" if extra else "no root", flush=True)
    keys = {"load_format": "enchtable", "model_loader_extra_config": extra}
    EnchTableModelLoader(compat.LoadConfig(**keys))
"""


def test_what_swapping_lacks_is_said_by_name_where_a_root_asks_for_it():
    done = subprocess.run(
        [sys.executable, "-c", OLDER],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        env=environment(VLLM_LOGGING_LEVEL="WARNING"),
    )
    before, said = done.stdout.split("\nroot\n", 1)
    assert "lacks" not in before
    assert said.count("its vLLM lacks a module, a function, a parameter;") == 1
    assert f"from vLLM {versions.swapping_bound()} on" in said


@pytest.mark.parametrize(
    ("installed", "standing"),
    [
        ("0.20.0", "tested"),
        ("0.20.0+cpu", "tested"),
        ("0.20.0rc1.dev5+gabc", "tested"),
        ("0.15.3", "between tested versions"),
        ("0.20.1", "newer than tested"),
        ("1.0", "newer than tested"),
        ("0.10.9", "too old"),
        ("0.9.2", "too old"),
        ("0.1.dev1+gabc", "unknown"),
        ("dev", "unknown"),
    ],
)
def test_standing(table, installed, standing):
    table("0.10.0 failed", "0.11.0 passed", "0.20.0 passed")
    assert versions.standing(installed) == standing
    if standing != "too old":
        versions.refuse_old(installed)


def test_a_refusal_names_what_is_missing(table, monkeypatch):
    table("0.10.0 failed", "0.11.0 passed")
    with pytest.raises(ConfigError) as refused:
        versions.refuse_old("0.9.2")
    assert "expected vLLM 0.11.0 or newer, got 0.9.2 (vLLM 0.10.0 lacks '0.10.0')" in str(
        refused.value
    )
    with pytest.raises(ConfigError, match=r"0\.9\.2 \(cannot import name 'x'\)"):
        versions.refuse_old("0.9.2", cause=ImportError("cannot import name 'x'"))
    versions.refuse_old(None)
    monkeypatch.setenv("ENCHTABLE_ANY_VLLM", "1")
    versions.refuse_old("0.9.2")


def test_what_only_slow_tests_prove_is_marked_as_such():
    labels = {"supports": {"b": True, "A": False}, "refuses": {"c": True}}
    made = supported.lines(labels)
    assert "| supported, each proved by a test | A\\*; b |\n" in made
    assert made.endswith("`make test-slow`, not `make test`.\n")
    assert "\\*" not in supported.lines({"supports": {"b": True}, "refuses": {}})


def test_this_environment_is_supported():
    installed = versions.installed_vllm()
    assert installed is not None
    assert versions.standing(installed) == "tested"
