"""The Grafana dashboard, as its panels and as what Prometheus is asked for them."""

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "enchtable.json"
BOARD = json.loads(DASHBOARD.read_text())
#: What Grafana puts for its variables.
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "5m"}


def panels(board=BOARD):
    """Every panel, rows and those that a collapsed row holds too."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries(board=BOARD):
    """Every query, as Prometheus gets it."""
    found = [target["expr"] for panel in panels(board) for target in panel.get("targets", ())]
    found += [each["expr"] for each in board["annotations"]["list"]]
    return [_filled(query) for query in found]


def template_values(prometheus, board=BOARD):
    """What each variable of the dashboard offers, asked as Grafana asks: name → values."""
    offered = {}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        query = _filled(variable["query"]["query"])
        match, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
        offered[variable["name"]] = prometheus.label_values(label, match)
    return offered


def _filled(query):
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query
