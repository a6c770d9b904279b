"""The dashboard and the rules in themselves; tests/serving/test_server.py asks a real server."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess

import pytest
import yaml

from kivi_vllm.config import QUANTIZED_DTYPES
from tests.deploy.expressions import (
    DEPLOY,
    dashboard,
    exported,
    of_dashboard,
    of_rules,
    parse,
    rules,
)

PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"] for variable in dashboard()["templating"]["list"]}


def test_parser_tells_promql_from_other_text() -> None:
    with pytest.raises(ValueError):
        parse("", "sum(rate(vllm:prompt_tokens_total[5m])")
    found = parse("", 'sum by (le) (rate(a_bucket{x="1"}[$__rate_interval])) / vllm:b{y=~"$y"}')
    assert found.metrics == {"a_bucket", "vllm:b"}
    assert found.labels == {"le", "x", "y"}


def test_every_expression_is_promql_and_selects_something() -> None:
    for expression in (*of_dashboard(), *of_rules()):
        assert expression.metrics, expression
    assert len(list(of_dashboard())) > 20
    assert len({name for item in exported() for name in item.metrics}) > 15


def test_panels_have_ids_places_and_words_of_their_own() -> None:
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"] for panel in PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        columns = range(at["x"], at["x"] + at["w"])
        cells = set(itertools.product(columns, range(at["y"], at["y"] + at["h"])))
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_panels_ask_the_chosen_data_source_with_variables_that_exist() -> None:
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard())))
    assert used == VARIABLES | {"__rate_interval", "__all"}


def test_rules_are_complete() -> None:
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert len(names) == len(set(names))
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 5
    for alert in alerts:
        assert alert["for"] and alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_alerts_ask_for_series_that_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = {name for item in of_rules() for name in item.metrics if name.startswith("instance:")}
    assert asked and asked <= recorded


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    "words", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")]
)
def test_promtool(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_its_rules_and_the_server() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert [(DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"]] == [True]
    (job,) = config["scrape_configs"]
    down = next(rule for rule in rules() if rule.get("alert") == "VllmDown")
    assert f'job="{job["job_name"]}"' in down["expr"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    vllm = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["x-vllm"]
    assert vllm["networks"] == {"default": {"aliases": ["vllm"]}}


def test_grafana_is_told_where_its_dashboards_lie() -> None:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    (mounted,) = [
        volume.split(":")[1]
        for volume in compose["services"]["grafana"]["volumes"]
        if volume.startswith("./grafana:")
    ]
    (provider,) = yaml.safe_load(compose["configs"]["dashboards"]["content"])["providers"]
    assert provider["options"]["path"] == mounted
    (source,) = yaml.safe_load(compose["configs"]["datasources"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_rules_name_the_cache_dtypes_that_there_are() -> None:
    text = (DEPLOY / "prometheus" / "rules.yml").read_text()
    named = re.findall(r'cache_dtype!~"([^"]+)"', text)
    assert [set(names.split("|")) for names in named] == [set(QUANTIZED_DTYPES)]
