"""What watches a fleet asks for metrics that the server has, and says what it is meant to say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness.types import Usage
from mrsa_server.metrics import Metrics, StoreMetrics
from tests.deploy.conftest import CHART, ROOT, Document, Tool

Objects = Callable[..., dict[tuple[str, str], Document]]
ALERTS, DASHBOARD = CHART / "files/alerts.yaml", CHART / "files/dashboard.json"
# What Prometheus itself and its operator put on whatever they read.
TARGET_LABELS = {"namespace", "job", "instance", "pod", "le"}
_METRIC = re.compile(r"\b((?:mrsa|process|python|vllm)[a-z_:]*)(?:\{([^}]*)\})?")
_BY = re.compile(r"\b(?:by|on) \(([^)]*)\)")


@cache
def known() -> dict[str, set[str]]:
    """Every series of a server's /metrics, with its own labels."""
    metrics = Metrics()
    store = StoreMetrics(metrics)
    store.store_call("write", 0.1)
    metrics.count_run("finished")
    metrics.count_rollout("stop", Usage(prompt_tokens=1, completion_tokens=1))
    metrics.count_rejection("overloaded")
    metrics.skipped.labels("unread").inc()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def panels() -> Iterator[tuple[str, str]]:
    """Each expression of the dashboard, by its panel's title."""
    made = json.loads(DASHBOARD.read_text())
    for panel in made["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in made["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], re.sub(r"label_values\((.*), \w+\)", r"\1", variable["query"])


def rules() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def check(expression: str) -> None:
    """That the server has what an expression asks for."""
    series = known()
    asked = _METRIC.findall(expression)
    assert asked, expression
    own: set[str] = set()
    for name, selector in asked:
        assert name in series, f"{name} is no metric of the server: {expression}"
        own |= series[name]
        for label in re.findall(r"(\w+)\s*[=!]", selector):
            assert label in series[name] | TARGET_LABELS, f"{name} has no label {label}: {expression}"
    for labels in _BY.findall(expression):
        assert set(re.split(r",\s*", labels)) <= own | TARGET_LABELS, expression


@pytest.mark.parametrize(("title", "expression"), [*panels()])
def test_the_dashboard_shows_metrics_that_the_server_has(title: str, expression: str) -> None:
    check(expression)


@pytest.mark.parametrize(("alert", "expression"), [*rules()])
def test_alerts_are_on_metrics_that_the_server_has(alert: str, expression: str) -> None:
    check(expression)


def test_a_metric_that_the_server_has_not_is_found() -> None:
    for wrong in ("sum(mrsa_runs_lost)", 'mrsa_runs_total{colour="red"}', "sum by (colour) (mrsa_runs_total)"):
        with pytest.raises(AssertionError):
            check(wrong)


def test_every_panel_has_its_place_and_every_line_its_name() -> None:
    made = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids) > 20
    for panel in made["panels"]:
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)
    shown = {name for _, expression in panels() for name, _ in _METRIC.findall(expression)}
    own = {name for name in known() if name.startswith("mrsa_") and not name.endswith(("_bucket", "_sum"))}
    bare = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    assert {name for name in own if re.sub(r"_(count|total)$", "", name) not in bare} == set()


@pytest.mark.deploy
def test_the_dashboard_is_what_its_script_writes(tool: Tool) -> None:
    assert tool("python", ROOT / "deploy/dashboard.py").stdout == DASHBOARD.read_text()


@pytest.mark.deploy
def test_what_scales_is_a_metric_of_the_server(objects: Objects) -> None:
    found = objects("cuda-pool")
    for trigger in found["ScaledObject", "mrsa-engine"]["spec"]["triggers"]:
        check(trigger["metadata"]["query"])
    for metric in found["HorizontalPodAutoscaler", "mrsa-server"]["spec"]["metrics"]:
        assert metric["pods"]["metric"]["name"] in known()


@pytest.mark.deploy
def test_the_adapter_s_rule_of_the_readme_serves_what_scales_the_servers(objects: Objects, tmp_path: Path) -> None:
    text = (ROOT / "deploy/README.md").read_text()
    (rule,) = yaml.safe_load(re.findall(r"```yaml\n(- seriesQuery.*?)```", text, re.DOTALL)[0])
    (name,) = re.findall(r'__name__=~"(.*?)"', rule["seriesQuery"])
    spec = objects("cuda-pool")["HorizontalPodAutoscaler", "mrsa-server"]["spec"]
    assert all(re.fullmatch(name, metric["pods"]["metric"]["name"]) for metric in spec["metrics"])
    asked = rule["metricsQuery"].replace("<<.Series>>", "mrsa_runs_queued").replace("<<.GroupBy>>", "pod")
    asked = asked.replace("<<.LabelMatchers>>", 'namespace="ai",pod=~"a|b"')
    promtool(tmp_path, [rule["seriesQuery"], asked])


@pytest.mark.deploy
def test_the_chart_brings_the_rules_and_the_dashboard_as_they_are(objects: Objects) -> None:
    found = objects("cuda-pool")
    assert found["PrometheusRule", "mrsa"]["spec"] == yaml.safe_load(ALERTS.read_text())
    assert found["ConfigMap", "mrsa-dashboard"]["data"]["mrsa-server.json"] == DASHBOARD.read_text()


def find_promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("MRSA_REQUIRE_PROMTOOL"):
            pytest.fail("promtool is missing: `apt-get install prometheus`")
        pytest.skip("promtool is not installed (`apt-get install prometheus`)")
    return found


def promtool(folder: Path, expressions: list[str]) -> None:
    """That Prometheus reads them."""
    rules = [{"record": f"made:{index}", "expr": expression} for index, expression in enumerate(expressions)]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "made", "rules": rules}]}))
    done = subprocess.run([find_promtool(), "check", "rules", folder / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ring_when_they_should(tmp_path: Path) -> None:
    program = find_promtool()
    for path in (ALERTS, ROOT / "tests/deploy/alerts_test.yaml"):
        shutil.copy(path, tmp_path)
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = yaml.safe_load((tmp_path / "alerts_test.yaml").read_text())["tests"]
    rung = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert rung == {alert for alert, _ in rules()}
