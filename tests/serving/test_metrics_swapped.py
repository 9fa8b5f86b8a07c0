"""Metrics of a server that swaps, as a real Prometheus sees them: one API server, and two."""

import math

import pytest
from dashboard import queries, template_values
from live import ADMIN, Live, make_root
from prometheus import Prometheus, ours, samples


def shows(prometheus, query):
    """Whether there is something to draw."""
    return any(not math.isnan(value) for value in prometheus.ask_all(query))


def scrape(server):
    return samples(ours(server.http.get("/metrics").text))


def until_each_has_swapped(server, api_servers):
    """What to swap to, ``sv-b`` last: which API server is asked is chance, and each is to be."""
    yield from ["sv-b", "@none", "sv-a"] * api_servers
    yield "sv-b"
    for _ in range(20):
        if len(set(server.swapped_by())) == api_servers:
            return
        yield from ["@none", "sv-a", "sv-b"]
    raise AssertionError("the other API server was never asked")


@pytest.mark.supports("metrics of swaps, one API server and several")
@pytest.mark.parametrize("api_servers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_swaps_do_is_scraped(family, tmp_path, api_servers):
    root = make_root(family, tmp_path / "vectors")
    several = ["--enforce-eager", "--api-server-count", str(api_servers)]
    with (
        Live(root, tmp_path / "log", *several) as server,
        Prometheus(server.url, tmp_path / "prometheus") as prometheus,
    ):
        server.ask_anew()
        assert prometheus.ask_until('enchtable_active_vector_info{name="sv-a"}', 1) == 1
        server.tokens()  # for what vLLM's own metrics show
        paused_seconds = 0.0
        targets = []
        for target in until_each_has_swapped(server, api_servers):
            targets.append(target)
            paused_seconds += server.swapped(target)["paused_seconds"]
            shown = scrape(server)
            active = [k for k, v in shown.items() if k.startswith("enchtable_active") and v]
            assert len(active) == 1
            assert f'name="{target}"' in active[0]
            assert shown["enchtable_unmerged"] == (target == "@none")
        _, done = server.rollback()
        assert (done["outcome"], done["to"]) == ("rolled_back", "sv-a"), done
        paused_seconds += done["paused_seconds"]
        _, done = server.swap("sv-b", dry_run=True)
        assert done["outcome"] == "dry_run"
        staged_bytes = done["staged_bytes"]
        refusals = [
            server.swap("sv-unplanned"),
            server.swap("missing"),
            server.swap("sv-flipped"),
            server.post("/v1/enchtable/swap", {"safety_vektor": "sv-a"}),
            server.post("/v1/enchtable/swap", {}, headers={}),
            server.post("/v1/enchtable/swap", {}, dict.fromkeys(ADMIN, "another")),
        ]
        assert [code for code, _ in refusals] == [422, 404, 422, 422, 401, 403]
        swaps = len(targets)
        wanted = {
            'enchtable_swaps_total{outcome="swapped",phase="done"}': swaps,
            'enchtable_swaps_total{outcome="rolled_back",phase="done"}': 1,
            'enchtable_swaps_total{outcome="dry_run",phase="stage"}': 1,
            'enchtable_swaps_total{outcome="refused",phase="stage"}': 3,
            "sum(enchtable_swaps_total)": swaps + 5,
            "enchtable_swap_paused_seconds_count": swaps + 1,
            "enchtable_swap_paused_seconds_sum": paused_seconds,
            "enchtable_staged_bytes": staged_bytes,
            'enchtable_refused_requests_total{reason="no_plan"}': 1,
            'enchtable_refused_requests_total{reason="unknown_vector"}': 1,
            'enchtable_refused_requests_total{reason="refused"}': 1,
            'enchtable_refused_requests_total{reason="invalid_request"}': 1,
            'enchtable_refused_requests_total{reason="admin_token_missing"}': 1,
            'enchtable_refused_requests_total{reason="admin_token_wrong"}': 1,
            "sum(enchtable_refused_requests_total)": 6,
            'enchtable_verification_failures_total{kind="SafetyVectorError"}': 1,
            "sum(enchtable_verification_failures_total)": 1,
            "enchtable_epoch": swaps + 1,
            "sum(enchtable_active_vector_info)": 1,
            'enchtable_active_vector_info{name="sv-a"}': 1,
            "enchtable_unmerged": 0,
            "enchtable_ready": 1,
            "enchtable_ranks_disagreeing": 0,
            # Every matrix of every merge: at the start, by swaps to a vector, by the roll-back.
            "sum(enchtable_attenuation_ratio_count)": 8 * (1 + swaps - targets.count("@none") + 1),
        }
        found = {query: prometheus.ask_until(query, value) for query, value in wanted.items()}
        assert found == pytest.approx(wanted)
        assert paused_seconds > 0
        assert staged_bytes > 0
        active, shown = server.status()["active"], scrape(server)
        assert shown["enchtable_retained_share_ratio"] == active["retained_share"]
        assert shown["enchtable_merge_seconds"] == active["seconds"]
        for name in ("beta", "norm_scale", "merged_bytes"):
            assert shown[f"enchtable_{name}"] == active[name]
        assert not server.lines("could not be set")
        without = [query for query in queries() if not shows(prometheus, query)]
        assert not without
        instance = server.url.removeprefix("http://")
        assert template_values(prometheus) == {"job": ["vllm"], "instance": [instance]}
