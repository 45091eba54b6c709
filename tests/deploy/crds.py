"""Run by the tools' own Python: whether objects of KEDA, Knative and Prometheus' operator are what their CRDs say.

Reads a JSON list of objects, prints what is wrong with them. A field that no CRD knows is wrong too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.knative_serving.serving import v1 as knative
from cloudcoil.models.prometheus_operator import v1 as prometheus
from pydantic import ValidationError

MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("serving.knative.dev/v1", "Service"): knative.Service,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus.ServiceMonitor,
    ("monitoring.coreos.com/v1", "PodMonitor"): prometheus.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus.PrometheusRule,
}


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """Fields of what was given that are not in what the model kept."""
    if isinstance(given, dict) and isinstance(kept, dict):
        gone = [f"{path}.{name}" for name in given if name not in kept]
        return gone + [one for name in given if name in kept for one in lost(given[name], kept[name], f"{path}.{name}")]
    if isinstance(given, list) and isinstance(kept, list):
        return [
            one for index, pair in enumerate(zip(given, kept, strict=True)) for one in lost(*pair, f"{path}[{index}]")
        ]
    return []


def main() -> None:
    """All of them. Strictly: else a quantity of "2" becomes a number, on which its pattern fails."""
    for document in json.load(sys.stdin):
        name = f"{document['kind']} {document['metadata']['name']}"
        model = MODELS.get((document["apiVersion"], document["kind"]))
        if model is None:
            print(f"{name}: no model")
            continue
        try:
            kept = model.model_validate(document, strict=True).model_dump(
                mode="json", by_alias=True, exclude_unset=True
            )
        except ValidationError as error:
            print(f"{name}: {error}")
            continue
        for path in lost(document, kept):
            print(f"{name}: unknown {path}")


if __name__ == "__main__":
    main()
