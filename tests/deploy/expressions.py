"""PromQL of the dashboard and of the rules: what it selects, and by which labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FROM_PROMETHEUS = {"instance", "job"}
"""Labels that scraping adds."""


@dataclass(frozen=True)
class Expression:
    """One expression, where it stands, and what of a server it needs.

    Attributes:
        metrics: names of the samples that it selects.
        labels: those by which it selects and groups.

    """

    where: str
    text: str
    metrics: frozenset[str]
    labels: frozenset[str]


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    return json.loads((DEPLOY / "grafana" / "kivi_vllm.json").read_text())


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def parse(where: str, text: str) -> Expression:
    """Read an expression as Prometheus would, Grafana's variables filled in.

    Raises:
        ValueError: it is not PromQL.

    """
    metrics, labels = set(), set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql.VectorSelector):
            metrics.add(node.name)
            labels.update(matcher.name for matcher in node.matchers.matchers)
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql.walk(promql.parse(text.replace("$__rate_interval", "5m")), visit)
    return Expression(where, text, frozenset(metrics), frozenset(labels))


def of_dashboard() -> Iterator[Expression]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield parse(f"panel {panel['title']}, {target['refId']}", target["expr"])


def of_rules() -> Iterator[Expression]:
    for rule in rules():
        yield parse(rule.get("alert") or rule["record"], rule["expr"])


def exported() -> list[Expression]:
    """All expressions about what a server exports: not about what Prometheus itself records."""
    own = {"up"} | {rule["record"] for rule in rules() if "record" in rule}
    return [item for item in (*of_dashboard(), *of_rules()) if not item.metrics <= own]
