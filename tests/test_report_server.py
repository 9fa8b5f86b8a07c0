"""`enchtable report --server`: what a server says, and where it is not this plan."""

import json

import pytest
from replies import Replies, status
from reports import Page, report

from enchtable_vllm.plan import read_plan


def served_by(plan, plan_digest, **changes):
    """The status of a server that serves this plan, as it should."""
    return status(
        {
            "safety_vector": plan.safety_vector.name,
            "vector_digest": plan.safety_vector.fingerprint,
            "plan_digest": plan_digest,
            "beta": plan.beta,
            "scope": plan.scope,
        }
        | changes.pop("active", {}),
        task_model={"id": "t", "fingerprint": plan.task_model.fingerprint},
        **changes,
    )


METRICS = """# HELP enchtable_beta The beta in force.
enchtable_beta 0.5
enchtable_plan_seconds NaN
enchtable_attenuation_ratio_bucket{le="+Inf",module="self_attn.q_proj"} 4.0
enchtable_attenuation_ratio_count{module="self_attn.q_proj"} 4.0
enchtable_attenuation_ratio_sum{module="self_attn.q_proj"} 3.0
vllm:num_requests_running 1.0
"""


@pytest.fixture
def server(family):
    plan, plan_digest = read_plan(family.plan)
    replies = Replies()

    def says(**changes):
        replies.on("GET", "/v1/enchtable/status", served_by(plan, plan_digest, **changes))

    replies.says = says
    says()
    replies.on("GET", "/metrics", METRICS)
    return replies


def test_a_server_that_serves_this_plan(server, family, tmp_path):
    with server.serve() as url:
        _, errors = report("--plan", family.plan, "--server", url, "-o", tmp_path / "r.html")
        printed = json.loads(report("--plan", family.plan, "--server", url, "--json")[0])
    assert "warning" not in errors
    assert printed["warnings"] == []
    assert printed["served"]["status"]["said_by_a_newer_server"] is True
    assert {"name": "enchtable_beta", "labels": {}, "value": 0.5} in printed["served"]["metrics"]
    text = Page((tmp_path / "r.html").read_text()).text
    assert "What the server says" in text
    assert "enchtable_attenuation_ratio (module self_attn.q_proj)40.750" in text  # how many, mean
    assert "plan_seconds" not in text  # it has no value


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"state": "failed", "ready": False, "reason": "rank 1"}, "generation is paused: rank 1"),
        ({"ready": False}, "it is not ready"),
        ({"disagreeing": 2}, "2 of its ranks serve something else"),
        ({"as_desired": False}, "a restart would serve something else"),
        ({"active": {"safety_vector": "@none"}}, "without any safety vector"),
        ({"active": {"vector_digest": "blake3:aa"}}, "another safety vector than the plan's"),
        ({"active": {"plan_digest": "blake3:aa"}}, "by another plan: blake3:aa"),
        ({"active": {"beta": 0.7}}, "Make it again with --beta 0.7"),
        ({"active": {"scope": "all"}}, "Make it again with --scope all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_server_that_does_not(changes, warning, server, family):
    server.says(**changes)
    with server.serve() as url:
        out, errors = report("--plan", family.plan, "--server", url, "--json")
    first = json.loads(out)["warnings"][0]
    assert first.startswith(f"the server {url}: ")
    assert warning in first
    assert warning in errors


def test_a_server_of_another_model_or_without_metrics(server, family, tmp_path):
    server.on("GET", "/v1/enchtable/status", status())
    server.on("GET", "/metrics", (404, "none"))
    page = tmp_path / "r.html"
    with server.serve() as url:
        _, errors = report("--plan", family.plan, "--server", url, "-o", page)
    assert "another task model" in errors
    assert "shows no metrics" in page.read_text()


def test_a_server_that_does_not_answer_is_refused_before_anything_is_written(family, tmp_path):
    replies = Replies()
    replies.on("GET", "/v1/enchtable/status", (404, {"detail": "Not Found"}))
    with replies.serve() as url:
        refused = report("--plan", family.plan, "--server", url, "-o", tmp_path / "r", code=1)
    assert "--load-format enchtable" in str(refused)
    assert list(tmp_path.iterdir()) == []
