"""Alerts and dashboard ask for metrics that there are, and Prometheus and Grafana find them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

from models.errors import all_problems
from service.errors import Overloaded
from service.metrics import IMAGE_OUTCOMES, NAMES
from tests.deployment import DOCKER, load, services


def metrics_in(expression: str) -> set[str]:
    """The metric names in a PromQL expression, or in Grafana's label_values(metric, label), without histogram suffixes."""
    expression = re.sub(r"label_values\((\w+), *\w+\)", r"\1", expression)
    expression = re.sub(r'"[^"]*"', "", expression)
    expression = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)
    expression = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expression)
    words = re.findall(r"[A-Za-z_:][\w:]*(?!\w*\s*\()", expression)
    names = set(words) - {"and", "or", "unless", "bool", "offset"}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def dashboard() -> Any:
    return json.loads((DOCKER / "grafana/dashboards/badexpert.json").read_text())


def expressions() -> Iterator[tuple[str, str]]:
    """(who asks, what is asked) for everything that is asked of Prometheus."""
    yield from ((f"alert {rule['alert']}", rule["expr"]) for rule in alert_rules())
    yield from ((f"variable {variable['name']}", variable["query"]) for variable in dashboard()["templating"]["list"])
    yield from ((f"panel {panel['title']}", target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"])


def test_names_of_metrics_are_found_in_an_expression() -> None:
    expression = 'sum by (guard) (rate(a_bucket{b="c"}[5m])) / on (d) group_left () e > 0.8 and absent(f) or histogram_quantile(0.9, g_sum)'
    assert metrics_in(expression) == {"a", "e", "f", "g"}
    assert metrics_in("label_values(h, i)") == {"h"}


@pytest.mark.parametrize("expression", [pytest.param(asked, id=who) for who, asked in expressions()])
def test_alerts_and_dashboard_ask_only_for_metrics_that_the_service_has(expression: str) -> None:
    names = metrics_in(expression) - {"up"}  # which Prometheus makes itself
    assert names
    assert all(name.startswith("badexpert_") for name in names)
    assert names <= NAMES


def test_every_problem_of_the_server_that_ends_an_image_has_an_alert_and_the_answers_to_mistakes_have_none() -> None:
    (expression,) = (rule["expr"] for rule in alert_rules() if rule["alert"] == "BadExpertImagesNotJudged")
    asked = re.search(r'outcome=~"([a-z_|]+)"', expression)
    assert asked
    ours = {kind.code for kind in all_problems() if kind.status >= 500} | {Overloaded.code}
    assert set(asked[1].split("|")) == set(IMAGE_OUTCOMES) & ours


def test_every_alert_says_what_it_means_and_how_urgent_it_is() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["for"]


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    datasource = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    provider = load("grafana/provisioning/dashboards/badexpert.yaml")["providers"][0]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in services()["grafana"]["volumes"]}
    assert datasource["url"] == "http://prometheus:9090"
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    home = PurePosixPath(services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DOCKER / mounts[str(home.parent)] / home.name).is_file()
    uses = [panel["datasource"] for panel in dashboard()["panels"]]
    uses += [target["datasource"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert all(use == {"type": datasource["type"], "uid": datasource["uid"]} for use in uses)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("arguments", ["check config --syntax-only prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"])
def test_prometheus_itself_accepts_the_rules(arguments: str) -> None:
    finished = subprocess.run(["promtool", *arguments.split()], cwd=DOCKER, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
