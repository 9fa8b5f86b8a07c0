"""Metrics of a server that swaps, as a real Prometheus sees them: one API server, and two."""

import json
import shutil
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import models
import pytest
from prometheus import ARGUMENTS, Prometheus, ours, samples

from enchtable_vllm.checkpoint import Checkpoint, locate, sampled_fingerprint
from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.plan.vector_root import plan_path
from enchtable_vllm.vector import build_vector

TOKEN = "a token for tests"


@pytest.fixture
def root(family, tmp_path):
    """Two vectors with their plans, and one without a plan."""
    path = tmp_path / "vectors"
    fingerprint = sampled_fingerprint(Checkpoint(family.task, what="task model"))
    surrogate = models.perturbed(
        family.aligned, tmp_path / "surrogate", scale=2e-3, seed=7, only="self_attn"
    )
    shutil.copytree(family.vector, path / "sv-a")
    shutil.copytree(family.vector, path / "unplanned")
    build_vector(locate(family.aligned), locate(surrogate), path / "sv-b", scope="attention")
    for name in ("sv-a", "sv-b"):
        plan = plan_path(path / name, fingerprint)
        plan.parent.mkdir()
        plan.write_text(models.plan_for(family.task, family.base, path / name, beta=0.5).to_json())
    return path


class Client:
    """Each request on a connection of its own: either API server may get it."""

    def __init__(self, server):
        self._url = server.url

    def get(self, path):
        with urlopen(self._url + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, path, body, token=TOKEN):
        """Status and document."""
        headers = {"X-Enchtable-Admin-Token": token, "Content-Type": "application/json"}
        request = Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)


@pytest.mark.parametrize("api_servers", [1, 2])
def test_what_swaps_do_is_scraped(family, root, tmp_path, monkeypatch, api_servers):
    monkeypatch.setenv("VLLM_PLUGINS", "enchtable")
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", TOKEN)
    extra = {"safety_vector": "sv-a", "vector_root": str(root)}
    arguments = [
        *ARGUMENTS, "--load-format", "enchtable", "--api-server-count", str(api_servers),
        "--model-loader-extra-config", json.dumps(extra),
    ]  # fmt: skip
    with (
        Server(family.task, arguments, tmp_path / "log", port=free_port()) as server,
        Prometheus(server.url, tmp_path / "prometheus") as prometheus,
    ):
        client = Client(server)
        started = 'enchtable_active_vector_info{name="sv-a"}'
        assert prometheus.ask_until(started, 1) == 1
        paused_seconds = 0.0
        targets = ["sv-b", "@none", "sv-a", "sv-b"] * api_servers
        for target in targets:
            code, done = client.post("/v1/enchtable/swap", {"safety_vector": target})
            assert (code, done["outcome"]) == (200, "swapped"), done
            paused_seconds += done["paused_seconds"]
            active = {k for k, v in samples(ours(client.get("/metrics"))).items()
                      if k.startswith("enchtable_active") and v == 1}  # fmt: skip
            assert len(active) == 1
            assert f'name="{target}"' in active.pop()
        code, done = client.post("/v1/enchtable/rollback", {})
        assert (code, done["to"]) == (200, "sv-a"), done
        paused_seconds += done["paused_seconds"]
        code, done = client.post("/v1/enchtable/swap", {"safety_vector": "sv-b", "dry_run": True})
        assert (code, done["outcome"]) == (200, "dry_run")
        staged_bytes = done["staged_bytes"]
        refusals = [
            client.post("/v1/enchtable/swap", {"safety_vector": "unplanned"}),
            client.post("/v1/enchtable/swap", {"safety_vector": "missing"}),
            client.post("/v1/enchtable/swap", {"safety_vektor": "sv-a"}),
            client.post("/v1/enchtable/swap", {"safety_vector": "sv-a"}, token="another"),
        ]
        assert [code for code, _ in refusals] == [422, 404, 422, 403]
        swaps = len(targets)
        wanted = {
            'enchtable_swaps_total{outcome="swapped",phase="done"}': swaps,
            'enchtable_swaps_total{outcome="rolled_back",phase="done"}': 1,
            'enchtable_swaps_total{outcome="dry_run",phase="stage"}': 1,
            'enchtable_swaps_total{outcome="refused",phase="stage"}': 2,
            "sum(enchtable_swaps_total)": swaps + 4,
            "enchtable_swap_paused_seconds_count": swaps + 1,
            "enchtable_swap_paused_seconds_sum": paused_seconds,
            "enchtable_staged_bytes": staged_bytes,
            'enchtable_refused_requests_total{reason="no_plan"}': 1,
            'enchtable_refused_requests_total{reason="unknown_vector"}': 1,
            'enchtable_refused_requests_total{reason="invalid_request"}': 1,
            'enchtable_refused_requests_total{reason="admin_token_wrong"}': 1,
            "sum(enchtable_refused_requests_total)": 4,
            "enchtable_epoch": swaps + 1,
            "sum(enchtable_active_vector_info)": 1,
            'enchtable_active_vector_info{name="sv-a"}': 1,
            "enchtable_unmerged": 0,
            "enchtable_ready": 1,
            "enchtable_ranks_disagreeing": 0,
            # Every merge of every matrix: at the start, by swaps that merged, by the roll-back.
            "sum(enchtable_attenuation_ratio_count)": 8 * (1 + swaps * 3 // 4 + 1),
        }
        found = {query: prometheus.ask_until(query, value) for query, value in wanted.items()}
        assert found == pytest.approx(wanted)
        assert paused_seconds > 0
        assert staged_bytes > 0
        status = json.loads(client.get("/v1/enchtable/status"))
        found = samples(ours(client.get("/metrics")))
        for key in ("retained_share", "beta", "norm_scale", "seconds", "merged_bytes"):
            name = {"retained_share": "retained_share_ratio", "seconds": "merge_seconds"}
            assert found[f"enchtable_{name.get(key, key)}"] == status["active"][key]
        assert not server.lines("could not be set")
