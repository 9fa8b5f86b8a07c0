"""Checkov, a scanner of other people's rules, finds in deploy/ what is meant and nothing else.

In an environment of its own: it wants versions of packages that vLLM's exclude.
"""

import json
import shutil
import subprocess
import venv

import pytest
import yaml
from manifests import DEPLOY, VALUES, documents

pytestmark = pytest.mark.slow

CHECKOV = "checkov==3.3.30"
MEANT = set(yaml.safe_load((DEPLOY / "checkov.yaml").read_text())["skip-check"])


@pytest.fixture(scope="module")
def checkov(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkov")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", CHECKOV], check=True)
    return folder / "bin" / "checkov"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """What a cluster and an image's build would be given."""
    folder = tmp_path_factory.mktemp("deployed")
    for name in VALUES:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(documents(name)))
    shutil.copyfile(DEPLOY / "docker" / "Dockerfile", folder / "Dockerfile")
    return folder


def findings(checkov, folder, *options):
    """Rule → what breaks it; and how many rules were kept."""
    done = subprocess.run(
        [checkov, "-d", folder, "-o", "json", "--framework", "kubernetes", "dockerfile", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    reports = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    failed = [check for report in reports for check in report["results"]["failed_checks"]]
    assert (done.returncode != 0) == bool(failed), done.stderr
    kept = sum(report["summary"]["passed"] for report in reports)
    return {check["check_id"]: check["resource"] for check in failed}, kept


def test_what_is_found_is_meant(checkov, deployed):
    found, kept = findings(checkov, deployed)
    assert found.keys() == MEANT, found
    assert kept > 300


def test_with_our_settings_nothing_is_found(checkov, deployed):
    found, kept = findings(checkov, deployed, "--config-file", str(DEPLOY / "checkov.yaml"))
    assert found == {}
    assert kept > 300


def test_a_container_that_may_do_more_is_found(checkov, deployed, tmp_path):
    text = (deployed / "minimal.yaml").read_text()
    assert "readOnlyRootFilesystem: true" in text
    changed = text.replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")
    (tmp_path / "changed.yaml").write_text(changed)
    found, _ = findings(checkov, tmp_path, "--config-file", str(DEPLOY / "checkov.yaml"))
    assert found.keys() == {"CKV_K8S_22"}
