"""Samples out of ``/metrics``, against Prometheus' own reader of the same text."""

import math

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from enchtable_vllm.fleet.samples import Sample, read_samples
from enchtable_vllm.serving.metrics import ServerMetrics


def by_prometheus(text):
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("enchtable_")
    ]


def alike(one, other):
    same = one.value == other.value or (math.isnan(one.value) and math.isnan(other.value))
    return same and (one.name, one.labels) == (other.name, other.labels)


@pytest.mark.parametrize(
    "name", ["sv-a", 'with "quotes"', "back\\slash\\n", "a\nline", "a } b, c="]
)
def test_as_prometheus_reads_them(name):
    registry = CollectorRegistry()
    ServerMetrics(registry)
    Gauge("enchtable_named", "x", ["name", "more"], registry=registry).labels(name, "y").set(2)
    Gauge("vllm_other", "x", registry=registry).set(1)
    text = generate_latest(registry).decode()
    found, expected = read_samples(text), by_prometheus(text)
    assert len(found) == len(expected) > 50
    assert all(map(alike, found, expected))


def test_what_is_no_sample_is_passed_over():
    assert (
        read_samples("enchtable_x one\n# enchtable_y 1\n enchtable_z 1\nenchtable_w{a} 1\n") == []
    )
