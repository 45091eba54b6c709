"""Writes Grafana's dashboard: `python deploy/dashboard.py > deploy/chart/files/dashboard.json`.

Needs grafana-foundation-sdk, of `make venv-deploy`. Whoever reads it wants to know, in this order: do clients get their
answers, what do they wait for, what does it cost, and is what is below well.
"""

from __future__ import annotations

import sys
from itertools import count
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE = '{namespace="$namespace", job="$job"}'
_HEIGHT, _WIDTH = 8, 8


def where(labels: str = "") -> str:
    """The selector of one release, and further labels."""
    return WHERE[:-1] + (f", {labels}" if labels else "") + "}"


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """How fast a counter grows, over all servers."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{where(labels)}[$__rate_interval]))"


def quantile(share: float, metric: str, labels: str = "") -> str:
    """Of a histogram, over all servers."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', labels)})"


def query(expression: str, legend: str, index: int = 0) -> prometheus.Dataquery:
    """One line of a panel, the A, B or C of it."""
    made = prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)
    return made.ref_id(ascii_uppercase[index])


def lines(title: str, unit: str, description: str, *queries: tuple[str, str]) -> timeseries.Panel:
    """A panel of lines over time."""
    panel = timeseries.Panel().title(title).unit(unit).description(description).datasource(SOURCE)
    panel = panel.height(_HEIGHT).span(_WIDTH).min(0).fill_opacity(10)
    panel = panel.legend(common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM))
    for index, (expression, legend) in enumerate(queries):
        panel = panel.with_target(query(expression, legend, index))
    return panel


def figure(title: str, unit: str, description: str, expression: str) -> stat.Panel:
    """A panel of one figure."""
    panel = stat.Panel().title(title).unit(unit).description(description).datasource(SOURCE)
    return panel.height(4).span(4).graph_mode(BigValueGraphMode.AREA).with_target(query(expression, ""))


def quantiles(metric: str, labels: str = "") -> tuple[tuple[str, str], ...]:
    """The three that are shown of every duration."""
    return tuple((quantile(share, metric, labels), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99))


def by(counter: str, label: str) -> tuple[str, str]:
    """A counter's growth, a line for each value of a label."""
    return rate(counter, label), "{{" + label + "}}"


def choice(name: str, label: str, values: str) -> dashboard.QueryVariable:
    """What is asked of whoever looks."""
    made = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(values)
    return made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def build() -> dashboard.Dashboard:
    """The whole."""
    made = dashboard.Dashboard("mrsa-server").uid("mrsa-server").tags(["mrsa-server"]).refresh("30s")
    made = made.time("now-6h", "now").with_variable(_source())
    made = made.with_variable(choice("namespace", "Namespace", "label_values(mrsa_runs_running, namespace)"))
    made = made.with_variable(choice("job", "Release", 'label_values(mrsa_runs_running{namespace="$namespace"}, job)'))
    numbers = count(1)
    for panel in head():
        made = made.with_panel(panel.id(next(numbers)))
    for title, panels in rows():
        made = made.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            made = made.with_panel(panel.id(next(numbers)))
    return made


def head() -> tuple[stat.Panel, ...]:
    """What is read at a glance."""
    failed = f"{rate('mrsa_runs_total', labels=_label('status', 'failed'))} / {rate('mrsa_runs_total')}"
    return (
        figure("Runs in flight", "short", "On all servers", f"sum(mrsa_runs_running{where()})"),
        figure("Runs that wait", "short", "For a place or the engine", f"sum(mrsa_runs_queued{where()})"),
        figure("Engines up", "short", "Servers that have one", f"sum(mrsa_engine_up{where()})"),
        figure("Stores up", "short", "Servers that have one", f"sum(mrsa_store_up{where()})"),
        figure("Runs that fail", "percentunit", "Of those that end", failed),
        figure("Tokens a second", "short", "Generated", _generated()),
    )


def rows() -> tuple[tuple[str, tuple[timeseries.Panel, ...]], ...]:
    """The questions in their order, and what answers each."""
    cached, prompt = (rate("mrsa_tokens_total", labels=_label("kind", kind)) for kind in ("cached", "prompt"))
    agreement = f"{rate('mrsa_answer_agreement_sum')} / {rate('mrsa_answer_agreement_count')}"
    return (
        (
            "Do clients get their answers?",
            (
                lines("Runs by their end", "reqps", "", by("mrsa_runs_total", "status")),
                lines("Seconds of a run", "s", "From admission to its end", *quantiles("mrsa_run_duration_seconds")),
                lines("Turned away", "reqps", "Before a run began", by("mrsa_admission_rejections_total", "reason")),
            ),
        ),
        (
            "What do they wait for?",
            (
                lines(
                    "Runs",
                    "short",
                    "What servers and engines are scaled by",
                    (f"sum(mrsa_runs_running{where()})", "in flight"),
                    (f"sum(mrsa_runs_queued{where()})", "waiting"),
                    (f"max(mrsa_runs_left_behind{where()})", "left behind"),
                ),
                lines(
                    "Rollouts that wait",
                    "short",
                    "For room in the engine",
                    (f"sum(mrsa_rollouts_waiting{where()})", "waiting"),
                ),
                lines("Their seconds until then", "s", "", *quantiles("mrsa_rollout_admission_seconds")),
                lines("Seconds of a round", "s", "Its stragglers in it", *quantiles("mrsa_round_duration_seconds")),
                lines(
                    "Tokens in the engine",
                    "short",
                    "Prompts, and what is expected of generations",
                    (f"sum(mrsa_inflight_tokens{where()})", "counted"),
                    (f"sum(mrsa_inflight_tokens_limit{where()})", "limit"),
                ),
                lines("Rollouts by their end", "reqps", "", by("mrsa_rollouts_total", "outcome")),
            ),
        ),
        (
            "What does it cost, and is it worth it?",
            (
                lines("Tokens a second", "short", "", by("mrsa_tokens_total", "kind")),
                lines("Tokens a run", "short", "", (f"{_generated()} / {rate('mrsa_runs_total')}", "generated")),
                lines("Prompts out of the prefix cache", "percentunit", "", (f"{cached} / {prompt}", "cached")),
                lines(
                    "Rollouts never started",
                    "reqps",
                    "Of those that a loop round by round would have run",
                    by("mrsa_rollouts_skipped_total", "reason"),
                ),
                lines("Agreement", "percentunit", "Share of candidates with the chosen answer", (agreement, "mean")),
            ),
        ),
        (
            "Is what is below well?",
            (
                lines("Seconds of a checkpoint", "s", "", *quantiles("mrsa_store_seconds", 'operation="write"')),
                lines(
                    "Runs that changed hands",
                    "short",
                    "In five minutes",
                    (f"sum(increase(mrsa_lease_takeovers_total{where()}[5m]))", "taken up"),
                    (f"sum(increase(mrsa_fenced_writes_total{where()}[5m]))", "writes fenced out"),
                ),
                lines("Memory", "bytes", "Of each server", (f"process_resident_memory_bytes{where()}", "{{instance}}")),
                lines(
                    "Cores",
                    "short",
                    "Of each server: at one it is full",
                    (f"rate(process_cpu_seconds_total{where()}[$__rate_interval])", "{{instance}}"),
                ),
                lines(
                    "File descriptors",
                    "percentunit",
                    "Of those that each server may have",
                    (f"process_open_fds{where()} / process_max_fds{where()}", "{{instance}}"),
                ),
                lines(
                    "Tasks",
                    "short",
                    "Of each server's event loop: at rest as many as after its start",
                    (f"mrsa_tasks{where()}", "{{instance}}"),
                ),
            ),
        ),
    )


def _source() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")


def _label(name: str, value: str) -> str:
    return f'{name}="{value}"'


def _generated() -> str:
    return rate("mrsa_tokens_total", labels='kind=~"reasoning|answer"')


if __name__ == "__main__":
    sys.stdout.write(JSONEncoder(sort_keys=True, indent=2).encode(build().build()) + "\n")
