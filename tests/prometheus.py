"""Prometheus for tests: promtool, a real server, and the text that they read."""

import json
import math
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.parse import urlencode
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from enchtable_vllm.demo.server import free_port


def program(name):
    """Where a program of Debian's package is; a test that needs it fails without it."""
    found = shutil.which(name)
    assert found, f"'{name}' is not on PATH: run 'make system-deps'"
    return found


def ours(text):
    """The part of an exposition that is this project's."""
    lines = re.findall(r"^(?:# \w+ )?enchtable_.*\n", text, re.MULTILINE)
    return "".join(lines)


def samples(text):
    """``name{label="value",…}`` → value, labels in order."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            key = sample.name + (f"{{{labels}}}" if labels else "")
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def lint(text):
    """What promtool has to say about an exposition; nothing, if it is as it should be."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr  # 3: it could be read, and has faults
    return done.stdout + done.stderr


@contextmanager
def scraping(url, folder, seconds=60):
    """A real Prometheus that scrapes a server each second; gives a function that asks it."""
    folder.mkdir()
    target = url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    own = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program("prometheus"), f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/data", f"--web.listen-address={own}"],
            stdout=log, stderr=log,
        )  # fmt: skip

    def ask(query):
        """Value of the one series that a query gives, or None."""
        with urlopen(f"http://{own}/api/v1/query?{urlencode({'query': query})}") as answer:
            result = json.load(answer)["data"]["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def until(query, value):
        """Ask until the answer is as expected; the last answer."""
        deadline, seen = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                seen = ask(query)
            except OSError:  # not up yet
                seen = None
            if seen is not None and math.isclose(seen, value, rel_tol=1e-12):
                break
            time.sleep(0.5)
        return seen

    try:
        yield until
    finally:
        process.terminate()
        process.wait(30)
