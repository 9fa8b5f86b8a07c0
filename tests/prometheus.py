"""Prometheus for tests: promtool, a real server, and the text that they read."""

import json
import math
import re
import shutil
import subprocess
import time
from contextlib import suppress
from urllib.parse import urlencode
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from enchtable_vllm.demo.server import free_port

#: Of a ``vllm serve`` that is up soon.
ARGUMENTS = [
    "--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager",
    "--skip-tokenizer-init",
]  # fmt: skip


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


class Prometheus:
    """A real one, on loopback, that scrapes a server each second.

    Args:
        url: The server.
        folder: For its storage and log; made here.
    """

    def __init__(self, url, folder):
        folder.mkdir()
        targets = [{"targets": [url.removeprefix("http://")]}]
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "vllm", "static_configs": targets}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        own = f"127.0.0.1:{free_port()}"
        self._url = f"http://{own}/api/v1"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program("prometheus"), f"--config.file={folder}/prometheus.yml",
                 f"--storage.tsdb.path={folder}/data", f"--web.listen-address={own}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)

    def ask_all(self, query):
        """Values of all series that a query gives."""
        result = self._get("query", query=query)["result"]
        return [float(series["value"][1]) for series in result]

    def label_values(self, label, match):
        """What a label says in the series that a selector gives; in order."""
        return self._get(f"label/{label}/values", **{"match[]": match})

    def _get(self, path, **parameters):
        with urlopen(f"{self._url}/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def ask(self, query):
        """Value of the one series that a query gives; None: it gives none."""
        result = self.ask_all(query)
        assert len(result) <= 1, result
        return result[0] if result else None

    def ask_until(self, query, value, seconds=60):
        """Ask until the answer is as expected; the last answer."""
        deadline, seen = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            with suppress(OSError):  # not up yet
                seen = self.ask(query)
            if seen is not None and math.isclose(seen, value, rel_tol=1e-9):
                break
            time.sleep(0.5)
        return seen
