"""Where Helm's library cannot be had, what renders the chart is left out; see pyproject.toml."""

import platform
import sys

collect_ignore = []
if sys.platform == "linux" and platform.machine() != "x86_64":
    collect_ignore += [
        "test_arguments.py", "test_chart.py", "test_chart_serves.py", "test_compose.py",
        "test_docker.py", "test_guides.py", "test_hardening.py", "test_kserve.py",
    ]  # fmt: skip
