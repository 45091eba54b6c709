"""The chart: what the tools say of every shape, and what they cannot know."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from mrsa_server import __version__
from mrsa_server.keyring import KeyRing, Scope
from mrsa_server.settings import Settings
from mrsa_server.tracing import wanted
from tests.deploy.conftest import CHART, REVISION, ROOT, SHAPES, Document, Tool, flags
from tests.helpers.keys import client, ring
from tests.helpers.ports import free_port
from tests.helpers.serving import on_port

pytestmark = pytest.mark.deploy
Objects = Callable[..., dict[tuple[str, str], Document]]
Render = Callable[..., str]
CUSTOM = ("keda.sh/", "serving.knative.dev/", "monitoring.coreos.com/")
# Kubernetes' own objects that none of checkov's rules may find fault with, but for these, and why.
ACCEPTED = {
    "CKV_K8S_8": "a Job and the test's pod end by themselves: there is nothing to be restarted",
    "CKV_K8S_9": "the same: nothing is sent to them",
    "CKV_K8S_11": "a CPU limit would stop the event loop in the middle of all its streams; the requests are the share",
    "CKV_K8S_15": "tags are of one version and digests of one image: pulling at each start makes the registry a need",
    "CKV_K8S_35": "the database's URL is a setting, and settings are read from the environment",
    "CKV_K8S_38": "the router alone has a token: it asks the API which engines there are, and may ask for nothing else",
    "CKV_K8S_43": "the digest of an image is its builder's to know: image.digest, as the shape cuda-image has it",
}


def pods(objects: dict[tuple[str, str], Document]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's spec, by kind and name."""
    for (kind, name), document in objects.items():
        if kind == "Pod":
            yield f"{kind} {name}", document["spec"]
        elif "template" in document.get("spec", {}):
            yield f"{kind} {name}", document["spec"]["template"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", ())]


def environment(objects: dict[tuple[str, str], Document], kind: str = "Deployment") -> dict[str, str | None]:
    name = "mrsa-server" if kind == "Deployment" else "mrsa"
    pod = objects[kind, name]["spec"]["template"]["spec"]
    return {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}


# What the tools say.


@pytest.mark.parametrize("shape", SHAPES)
def test_helm_finds_no_fault(tool: Tool, shape: str) -> None:
    said = tool("helm", "lint", "--strict", CHART, *flags(shape)).stdout
    assert "0 chart(s) failed" in said
    assert "[WARNING]" not in said


@pytest.mark.parametrize("shape", SHAPES)
def test_every_object_is_what_kubernetes_takes(tool: Tool, render: Render, tmp_path: Path, shape: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(render(shape))
    said = tool("kubernetes-validate", "--strict", path)
    unknown = set(re.findall(r"find schema for kind (\w+)", said.stdout + said.stderr))
    assert unknown <= {"ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule", "Service"}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_other_object_is_what_its_crd_says(tool: Tool, objects: Objects, shape: str) -> None:
    more = [f"monitoring.{name}.enabled=true" for name in ("serviceMonitor", "rules", "dashboard")]
    found = objects(shape, "--set", ",".join([*more, "monitoring.engines=true"])).values()
    asked = [document for document in found if document["apiVersion"].startswith(CUSTOM)]
    assert len(asked) >= 2
    assert tool("python", ROOT / "tests/deploy/crds.py", stdin=json.dumps(asked)).stdout == ""


def test_a_field_that_no_crd_knows_is_found(tool: Tool, objects: Objects) -> None:
    document = json.loads(json.dumps(objects("cuda-pool")["ScaledObject", "mrsa-engine"]))
    document["spec"]["cooldown"] = 5
    document["spec"]["triggers"][0]["metadata"] = []
    said = tool("python", ROOT / "tests/deploy/crds.py", stdin=json.dumps([document])).stdout
    assert "triggers" in said
    document["spec"]["triggers"][0]["metadata"] = {}
    said = tool("python", ROOT / "tests/deploy/crds.py", stdin=json.dumps([document])).stdout
    assert "cooldown" in said


@pytest.mark.parametrize("shape", ["cpu", "cuda-knative", "rocm-pool", "cuda-image"])
def test_checkov_finds_what_is_explained_and_no_more(tool: Tool, render: Render, tmp_path: Path, shape: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(render(shape))
    words = ["--framework", "kubernetes", "--output", "json", "--quiet", "--compact", "--skip-download"]
    said = json.loads(tool("checkov", "--file", path, *words, check=False).stdout)
    failed = {(one["check_id"], one["resource"]) for one in said["results"]["failed_checks"]}
    assert said["summary"]["passed"] > 100
    assert {check for check, _ in failed} <= set(ACCEPTED), failed
    ending = ("Job.ai.", "Pod.ai.mrsa-test")
    assert all(resource.startswith(ending) for check, resource in failed if check in {"CKV_K8S_8", "CKV_K8S_9"})
    assert {resource for check, resource in failed if check == "CKV_K8S_38"} <= {"Deployment.ai.mrsa-router"}
    if shape == "cuda-image":
        assert not any(check == "CKV_K8S_43" for check, _ in failed)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_object_is_there_twice(tool: Tool, render: Render, tmp_path: Path, shape: str) -> None:
    (tmp_path / "all.yaml").write_text(render(shape))
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    assert tool("kubectl", "kustomize", tmp_path).stdout.count("\nkind:") == render(shape).count("\nkind:")


# What they cannot know.


def test_the_chart_is_of_the_package_s_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["replicas=3"], "additional properties 'replicas' not allowed"),
        (["server.setings.max_runs=3"], "setings"),
        (["server.settings.database_url=postgresql://u:p@h/d"], "database_url"),
        (["server.replicas=0"], "minimum"),
        (["model.source=pvc", "model.revision=main"], "pattern"),
        (["server.settings.keys=x"], "keys"),
        (["model.source=pvc"], "model.repository"),
        (["store.kind=postgres"], "existingSecret"),
        (["server.replicas=2"], "several share a Postgres"),
        (["server.replicas=2", "store.kind=file"], "several share a Postgres"),
        (["knative.enabled=true", "store.kind=file"], "cannot share a file"),
        (["shape=pool"], "a pool is of engines with GPUs"),
        (["shape=pool", "accelerator.kind=cuda", "knative.enabled=true"], "only where shape is `single`"),
        (["server.terminationGracePeriodSeconds=20"], "at least preStopSeconds"),
        (["accelerator.kind=cuda"], "which weights?"),
        (["ingress.enabled=true"], "ingress.host"),
        (["httpRoute.enabled=true"], "httpRoute.parentRefs"),
        (["ingress.enabled=true", "knative.enabled=true"], "a gateway of its own"),
        (
            [
                "knative.enabled=true",
                "model.source=pvc",
                "model.repository=a/b",
                "model.pvc.accessModes={ReadWriteOnce}",
            ],
            "takes ReadWriteMany",
        ),
        (["model.source=pvc", "model.repository=a/b", "accelerator.kind=cuda", "model.path=/w"], "mounted at /models"),
        (["image.digest=sha256:abc"], "pattern"),
        (["tracing.endpoint=collector:4318"], "pattern"),
    ],
)
def test_values_that_make_no_sense_are_refused(tool: Tool, given: list[str], said: str) -> None:
    words = [word for one in given for word in ("--set", one)]
    refused = tool("helm", "template", "mrsa", CHART, *words, check=False)
    assert refused.returncode
    assert said in refused.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_are_those_of_the_server(objects: Objects, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(objects(shape), "Service" if "knative" in shape else "Deployment")
    given = {name: value for name, value in found.items() if name.startswith("MRSA_")}
    assert {name.removeprefix("MRSA_").lower() for name in given} <= set(Settings.model_fields)
    for name, value in given.items():
        monkeypatch.setenv(name, value or "postgresql+asyncpg://u@h/d")
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.engine == (
        "openai"
        if "pool" in shape or shape == "external"
        else "embedded"
        if "cpu" in shape or shape == "plain"
        else "vllm"
    )
    assert settings.engine_sleeps is ("pool" in shape)
    assert not settings.engine_sleeps or settings.engine_wait_s == 1800


def test_settings_that_are_false_or_zero_are_settings_too(objects: Objects) -> None:
    said = {"engine_sleeps": "false", "shutdown_grace_s": "0", "engine_priority": "false", "log_format": "text"}
    given = ",".join(f"server.settings.{name}={value}" for name, value in said.items())
    found = environment(objects("cuda-pool", "--set", given))
    assert {name: found[f"MRSA_{name.upper()}"] for name in said} == said


@pytest.mark.parametrize("file", [path.name for path in CHART.glob("values*.yaml") if path.name != "values-pool.yaml"])
def test_each_values_file_stands_by_itself(tool: Tool, file: str) -> None:
    assert "kind: Secret" in tool("helm", "template", "mrsa", CHART, "--values", CHART / file).stdout


def test_an_ingress_leads_to_the_servers(objects: Objects, tool: Tool, tmp_path: Path) -> None:
    given = "ingress.enabled=true,ingress.host=ai.example,ingress.className=nginx,ingress.tlsSecret=ai-tls"
    found = objects("cuda", "--set", given)
    made = found["Ingress", "mrsa"]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(made))
    tool("kubernetes-validate", "--strict", tmp_path / "one.yaml")
    (rule,) = made["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    backend = path["backend"]["service"]
    assert path["path"] == "/v1"
    assert backend["port"]["name"] in {port["name"] for port in found["Service", backend["name"]]["spec"]["ports"]}
    assert made["spec"]["tls"] == [{"hosts": ["ai.example"], "secretName": "ai-tls"}]


def test_a_route_of_a_gateway_leads_to_the_servers_and_bounds_no_stream(objects: Objects) -> None:
    given = (
        "httpRoute.enabled=true,httpRoute.parentRefs[0].name=public,httpRoute.hostnames={ai.example},service.port=81"
    )
    found = objects("cuda", "--set", given)
    spec = found["HTTPRoute", "mrsa"]["spec"]
    assert (spec["parentRefs"], spec["hostnames"]) == ([{"name": "public"}], ["ai.example"])
    (rule,) = spec["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    (backend,) = rule["backendRefs"]
    assert backend["port"] in {port["port"] for port in found["Service", backend["name"]]["spec"]["ports"]}


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        ("cuda-pool", ("--set-json", "networkPolicy.postgres=[]"), "networkPolicy.postgres is empty"),
        ("external", (), "networkPolicy.externalEngine is empty"),
        ("cpu", ("--set", "service.type=LoadBalancer"), "Add an ipBlock"),
        ("cuda-pool", ("--set", "monitoring.serviceMonitor.enabled=false"), "job=mrsa"),
        ("cpu", (), "helm test mrsa --namespace ai --timeout 5m"),
    ],
)
def test_the_notes_say_what_is_left_to_do(tool: Tool, shape: str, given: tuple[str, ...], said: str) -> None:
    words = ["install", "mrsa", CHART, "--namespace", "ai", "--dry-run=client", *flags(shape)]
    notes = [tool("helm", *words, *more).stdout.partition("NOTES:")[2] for more in ((), given)]
    assert said in notes[1]
    assert not given or said not in notes[0]


def test_what_the_readme_applies_by_hand_is_what_kubernetes_takes(tool: Tool, objects: Objects, tmp_path: Path) -> None:
    (text,) = re.findall(r"<<END\n(.*?)\nEND", (ROOT / "deploy/README.md").read_text(), re.DOTALL)
    (tmp_path / "one.yaml").write_text(text)
    tool("kubernetes-validate", "--strict", tmp_path / "one.yaml")
    (volume,) = yaml.safe_load(text)["spec"]["volumes"]
    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in objects("cuda")


def test_a_job_that_changes_is_another(objects: Objects) -> None:
    def jobs(*more: str) -> set[str]:
        return {name for kind, name in objects("cuda", *more) if kind == "Job"}

    assert len(jobs()) == 1
    assert jobs() == jobs("--set", "server.settings.max_runs=7")
    assert not jobs() & jobs("--set", "image.registry=other")


def test_weights_are_fetched_where_their_claim_can_be(objects: Objects) -> None:
    def claim_and_job(shape: str, *more: str) -> tuple[list[str], dict[str, Any]]:
        found = objects(shape, *more)
        (job,) = (document for (kind, _), document in found.items() if kind == "Job" and "weights" in str(document))
        modes: list[str] = found["PersistentVolumeClaim", "mrsa-models"]["spec"]["accessModes"]
        return modes, job["spec"]["template"]["spec"]

    modes, job = claim_and_job("cuda")
    assert modes == ["ReadWriteOnce"]
    (wanted,) = job["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    server = objects("cuda")["Deployment", "mrsa-server"]["spec"]["template"]
    assert wanted["labelSelector"]["matchLabels"].items() <= server["metadata"]["labels"].items()
    assert job["tolerations"] == server["spec"]["tolerations"]
    for shape, more in (("cuda-knative", ()), ("cuda", ("--set", "model.pvc.accessModes={ReadWriteMany}"))):
        modes, job = claim_and_job(shape, *more)
        assert modes == ["ReadWriteMany"]
        assert "affinity" not in job


@pytest.mark.parametrize("shape", ["cuda", "cuda-pool"])
def test_weights_are_fetched_by_the_image_that_reads_them(objects: Objects, shape: str) -> None:
    found = objects(shape, "--set", "image.tag=mine,engine.image.tag=theirs")
    (job,) = (document["spec"]["template"]["spec"] for (_, name), document in found.items() if "-weights-" in name)
    assert job["containers"][0]["image"] == f"mrsa-server:{'mine' if shape == 'cuda' else 'theirs'}"


@pytest.mark.parametrize("shape", ["cuda", "cuda-pool", "cuda-knative"])
def test_names_hold_however_long_the_release_s_is(tool: Tool, shape: str) -> None:
    """A Job's name is a label of its pods, and a Service's is a label of DNS."""
    release = "a" * 53
    made = yaml.safe_load_all(tool("helm", "template", release, CHART, *flags(shape)).stdout)
    assert all(len(document["metadata"]["name"]) <= 63 for document in made if document)


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_that_are_made_open_what_they_should(objects: Objects, shape: str, tmp_path: Path) -> None:
    found = objects(shape, "--set", "monitoring.serviceMonitor.enabled=true")
    made = {name: b64decode(value).decode() for name, value in found["Secret", "mrsa-keys"]["data"].items()}
    (tmp_path / "keys").write_text(made["keys"])
    ring = KeyRing(tmp_path / "keys")
    client, scraper = ring.find(made["client"]), ring.find(made["metrics"])
    assert client is not None
    assert scraper is not None
    assert client.scopes == {Scope.INFERENCE, Scope.RUNS_READ, Scope.RUNS_WRITE}
    assert scraper.scopes == {Scope.METRICS}
    kind, name = ("Service", "mrsa") if "knative" in shape else ("Deployment", "mrsa-server")
    pod = found[kind, name]["spec"]["template"]["spec"]
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "keys")
    (volume,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys")
    assert environment(found, kind)["MRSA_KEYS_FILE"] == f"{mount['mountPath']}/{volume['items'][0]['path']}"
    assert volume["secretName"] == "mrsa-keys"
    monitor = found["PodMonitor" if "knative" in shape else "ServiceMonitor", "mrsa"]["spec"]
    (endpoint,) = monitor.get("endpoints") or monitor["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": {"name": "mrsa-keys", "key": "metrics"}}


def test_a_database_s_ca_is_where_its_url_is_read(objects: Objects) -> None:
    more = [
        "--set-json", 'server.extraVolumes=[{"name":"ca","configMap":{"name":"ca"}}]',
        "--set-json", 'server.extraVolumeMounts=[{"name":"ca","mountPath":"/etc/ca"}]',
        "--set-json", 'server.extraEnv=[{"name":"PGSSLROOTCERT","value":"/etc/ca/ca.crt"}]',
    ]  # fmt: skip
    for migrate in ("job", "init"):
        found = objects("cuda-pool", *more, "--set", f"store.postgres.migrate={migrate}")
        asking = [
            (pod, container)
            for _, pod in pods(found)
            for container in containers(pod)
            if any(entry["name"] == "MRSA_DATABASE_URL" for entry in container.get("env", ()))
        ]
        assert len(asking) == 2
        for pod, container in asking:
            assert {"name": "PGSSLROOTCERT", "value": "/etc/ca/ca.crt"} in container["env"]
            assert {"name": "ca", "mountPath": "/etc/ca"} in container["volumeMounts"]
            assert {"name": "ca", "configMap": {"name": "ca"}} in pod["volumes"]


def test_another_version_of_the_chart_alone_starts_no_pod_anew(tool: Tool, tmp_path: Path) -> None:
    """An engine that loads for minutes least of all."""
    shutil.copytree(CHART, tmp_path / "chart")
    about = tmp_path / "chart/Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*$", "version: 9.9.9", about.read_text()))

    def templates(chart: Path) -> list[Any]:
        made = yaml.safe_load_all(tool("helm", "template", "mrsa", chart, *flags("cuda-pool")).stdout)
        return [document["spec"]["template"] for document in made if document and document["kind"] == "Deployment"]

    assert templates(tmp_path / "chart") == templates(CHART)


def test_keys_of_another_secret_and_none(objects: Objects) -> None:
    found = objects("cuda", "--set", "auth.existingSecret=ours,monitoring.serviceMonitor.enabled=true")
    assert not any(kind == "Secret" for kind, _ in found)
    assert "ours" in json.dumps(found["Deployment", "mrsa-server"])
    assert found["ServiceMonitor", "mrsa"]["spec"]["endpoints"][0]["authorization"]["credentials"]["name"] == "ours"
    (test,) = found["Pod", "mrsa-test"]["spec"]["containers"]
    assert {"name": "ours", "key": "client", "optional": True} in [
        entry["valueFrom"]["secretKeyRef"] for entry in test["env"] if "valueFrom" in entry
    ]
    found = objects("cuda", "--set", "auth.open=true,monitoring.serviceMonitor.enabled=true")
    assert not any(kind == "Secret" for kind, _ in found)
    assert environment(found)["MRSA_OPEN"] == "true"
    assert "authorization" not in found["ServiceMonitor", "mrsa"]["spec"]["endpoints"][0]


@pytest.mark.parametrize("shape", ["cuda", "cuda-pool", "cuda-knative"])
def test_a_collector_s_address_turns_traces_on(objects: Objects, shape: str) -> None:
    kind = "Service" if "knative" in shape else "Deployment"
    assert not wanted({name: value or "" for name, value in environment(objects(shape), kind).items()})
    given = ("--set", "tracing.endpoint=http://collector:4318", "--set", "server.extraEnv[0].name=A")
    found = environment(objects(shape, *given), kind)
    assert wanted({name: value or "" for name, value in found.items()})
    assert found["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert found["OTEL_SERVICE_NAME"] == "mrsa"
    resource = found["OTEL_RESOURCE_ATTRIBUTES"] or ""
    assert resource.startswith("k8s.namespace.name=ai")
    assert ("$(K8S_POD_NAME)" in resource) == ("K8S_POD_NAME" in found) == (kind == "Deployment")
    assert "A" in found


@pytest.mark.parametrize("shape", SHAPES)
def test_pods_may_nothing_that_they_need_not(objects: Objects, shape: str) -> None:
    for name, pod in pods(objects(shape)):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is (name == "Deployment mrsa-router"), name
        for container in containers(pod):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"], name
            assert not security["allowPrivilegeEscalation"], name
            assert security["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("shape", SHAPES)
def test_who_serves_is_offline_and_only_the_download_writes_weights(objects: Objects, shape: str) -> None:
    for name, pod in pods(objects(shape)):
        for container in containers(pod):
            given = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
            mounts = [mount for mount in container.get("volumeMounts", ()) if mount["name"] == "models"]
            downloads = "-weights-" in name
            assert all(mount.get("readOnly", False) is not downloads for mount in mounts)
            if container["name"] == "engine" or (mounts and container["name"] == "server"):
                assert given["HF_HUB_OFFLINE"] == "1"
            if downloads:
                assert given["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_server_drains_within_its_grace_and_loads_for_half_an_hour(objects: Objects, shape: str) -> None:
    found = objects(shape)
    kind, name = ("Service", "mrsa") if "knative" in shape else ("Deployment", "mrsa-server")
    pod = found[kind, name]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    loads = not ("pool" in shape or shape == "external")
    startup = container["startupProbe"]
    assert startup["httpGet"]["path"] == ("/health/ready" if loads else "/health/live")
    assert startup["periodSeconds"] * startup["failureThreshold"] == (300 if "cpu" in shape else 1800)
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    if kind == "Deployment":
        slept = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = float(environment(found)["MRSA_SHUTDOWN_GRACE_S"] or 0)
        assert 5 <= slept <= 10
        assert slept + grace + 20 <= pod["terminationGracePeriodSeconds"] == 120
        assert found["PodDisruptionBudget", "mrsa-server"]["spec"]["maxUnavailable"] == 1
        assert len(pod["topologySpreadConstraints"]) == 2


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "knative" in shape])
def test_knative_is_asked_for_nothing_that_its_webhook_refuses(objects: Objects, shape: str) -> None:
    """By the masks of its `fieldmask.go`, with all features on: its CRD takes more than it does."""
    pod = objects(shape)["Service", "mrsa"]["spec"]["template"]["spec"]
    assert set(pod["securityContext"]) <= {
        "runAsUser", "runAsGroup", "runAsNonRoot", "fsGroup", "supplementalGroups", "seccompProfile",
    }  # fmt: skip
    assert not {"terminationGracePeriodSeconds", "restartPolicy", "hostname", "subdomain"} & set(pod)
    for container in containers(pod):
        assert "lifecycle" not in container
        assert not {"seLinuxOptions", "procMount"} & set(container["securityContext"])
    for name, other in pods(objects(shape)):
        assert "seccompProfile" in other["securityContext"], name


def allows(rules: list[dict[str, Any]], direction: str, labels: dict[str, str]) -> bool:
    """Whether a pod of the same namespace with these labels is among the peers."""
    for rule in rules:
        for peer in rule.get(direction, ()):
            wanted = peer.get("podSelector", {}).get("matchLabels")
            if "namespaceSelector" not in peer and wanted is not None and wanted.items() <= labels.items():
                return True
    return False


@pytest.mark.parametrize("shape", ["cuda-pool", "rocm-pool", "rocm-pool-image"])
def test_only_the_router_reaches_an_engine_and_only_servers_the_router(objects: Objects, shape: str) -> None:
    found = objects(shape)
    policies = {
        document["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: document["spec"]
        for (kind, _), document in found.items()
        if kind == "NetworkPolicy"
    }
    labels = {component: {**policy["podSelector"]["matchLabels"]} for component, policy in policies.items()}
    reached = {
        (one, other)
        for one, other in product(policies, repeat=2)
        if allows(policies[one].get("egress", []), "to", labels[other])
        and allows(policies[other].get("ingress", []), "from", labels[one])
    }
    assert reached == {("server", "router"), ("router", "engine"), ("test", "server")}
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())
    peers = [peer for rule in policies["engine"]["ingress"] for peer in rule["from"]]
    assert peers == [{"podSelector": {"matchLabels": labels["router"]}}]
    assert [port["port"] for rule in policies["engine"]["egress"] for port in rule["ports"]] == [53, 53]
    for component in {"server", "migrate"} & set(policies):
        blocks = [
            peer["ipBlock"]["cidr"]
            for rule in policies[component]["egress"]
            for peer in rule["to"]
            if "ipBlock" in peer
        ]
        assert blocks == ["10.20.0.5/32"]
    components = {
        pod_labels["app.kubernetes.io/component"]
        for (kind, _), document in found.items()
        if (pod_labels := document.get("spec", {}).get("template", {}).get("metadata", {}).get("labels"))
    }
    assert components <= set(policies)


def test_prometheus_reads_engines_where_it_may(objects: Objects) -> None:
    usual = objects("cuda-pool")
    assert ("PodMonitor", "mrsa-engine") not in usual
    found = objects("cuda-pool", "--set", "monitoring.engines=true")
    wanted = found["PodMonitor", "mrsa-engine"]["spec"]
    template = found["Deployment", "mrsa-engine"]["spec"]["template"]
    assert wanted["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in wanted["podMetricsEndpoints"]} <= ports
    rules = [made["NetworkPolicy", "mrsa-engine"]["spec"]["ingress"] for made in (usual, found)]
    assert rules[1][:-1] == rules[0]
    assert rules[1][-1]["from"] == found["NetworkPolicy", "mrsa-router"]["spec"]["ingress"][-1]["from"]


def test_the_pool_sleeps_and_the_servers_metrics_wake_it(objects: Objects) -> None:
    found = objects("cuda-pool")
    scaled = found["ScaledObject", "mrsa-engine"]["spec"]
    assert (scaled["minReplicaCount"], scaled["scaleTargetRef"]["name"]) == (0, "mrsa-engine")
    assert "replicas" not in found["Deployment", "mrsa-engine"]["spec"]
    assert "replicas" not in found["Deployment", "mrsa-server"]["spec"]
    metrics = {
        metric["pods"]["metric"]["name"]
        for metric in found["HorizontalPodAutoscaler", "mrsa-server"]["spec"]["metrics"]
    }
    assert metrics == {"mrsa_runs_queued", "mrsa_runs_running"}
    job = found["Service", "mrsa"]["metadata"]["name"]  # what Prometheus' operator calls the targets of a Service
    for trigger in scaled["triggers"]:
        assert re.findall(r"\{.*?\}", trigger["metadata"]["query"])
        for selector in re.findall(r"\{.*?\}", trigger["metadata"]["query"]):
            assert selector == f'{{namespace="ai",job="{job}"}}'


def test_the_router_looks_for_pods_that_the_engine_s_deployment_makes(objects: Objects) -> None:
    found = objects("cuda-pool")
    words = found["Deployment", "mrsa-router"]["spec"]["template"]["spec"]["containers"][0]["args"]
    after = words[words.index("--selector") + 1 :]
    asked = dict(word.split("=") for word in after if not word.startswith("--"))
    made = found["Deployment", "mrsa-engine"]["spec"]["template"]["metadata"]["labels"]
    assert asked
    assert asked.items() <= made.items()


def test_gpus_are_asked_for_where_the_engine_is(objects: Objects) -> None:
    def gpus(shape: str, name: str) -> Any:
        pod = objects(shape)["Deployment", name]["spec"]["template"]["spec"]
        return pod["containers"][0]["resources"]["limits"], pod["securityContext"].get("supplementalGroups")

    assert gpus("cuda", "mrsa-server") == ({"memory": "64Gi", "nvidia.com/gpu": "1"}, None)
    assert gpus("rocm", "mrsa-server") == ({"memory": "64Gi", "amd.com/gpu": "1"}, [44, 109])
    assert gpus("rocm-pool", "mrsa-engine") == ({"memory": "64Gi", "amd.com/gpu": "1"}, [44, 109])
    assert gpus("rocm-pool", "mrsa-server") == ({"memory": "4Gi"}, None)
    assert gpus("cpu", "mrsa-server") == ({"memory": "8Gi"}, None)


def test_an_engine_uses_all_gpus_of_its_pod(objects: Objects) -> None:
    def arguments(shape: str, *more: str) -> Any:
        found = objects(shape, "--set", "accelerator.count=2", *more)
        if "pool" in shape:
            return found["Deployment", "mrsa-engine"]["spec"]["template"]["spec"]["containers"][0]["args"]
        return json.loads(environment(found)["MRSA_ENGINE_ARGS"] or "{}")

    assert arguments("cuda") == {"dtype": "bfloat16", "max_num_seqs": 256, "tensor_parallel_size": 2}
    assert "tensor_parallel_size" not in arguments("cuda", "--set", "server.settings.engine_args.data_parallel_size=2")
    assert "--tensor-parallel-size=2" in arguments("cuda-pool")
    others = arguments("cuda-pool", "--set", "engine.args={--data-parallel-size=2}")
    assert [word for word in others if "parallel" in word] == ["--data-parallel-size=2"]


_PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", *json.load(sys.stdin)])
print(found.model, found.served_model_name, found.scheduling_policy, found.prefix_cache_retention_interval)
"""


@pytest.mark.engine
def test_vllm_takes_the_arguments_of_an_engine(objects: Objects) -> None:
    container = objects("cuda-pool")["Deployment", "mrsa-engine"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["vllm", "serve"]
    words = [sys.executable, "-c", _PARSE]
    done = subprocess.run(words, input=json.dumps(container["args"]), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"/models/{REVISION} ['ZAYA1-8B'] priority 128"], done.stderr


# The programs inside of it.


async def test_helm_s_test_passes_on_a_server() -> None:
    asks = client("alice")
    async with on_port(keys=ring(asks)) as (url, _):
        given = {"URL": url, "TIMEOUT_S": "20", "MRSA_KEY": asks.secret}
        asked = await asyncio.create_subprocess_exec(
            sys.executable, CHART / "files/ask.py", env=given, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await asked.communicate()
    assert asked.returncode == 0
    assert b"'completion_tokens'" in said


async def test_helm_s_test_waits_for_a_server_that_is_not_there_yet() -> None:
    """As right after `helm install`: weights are fetched, the engine loads."""
    asks, port = client("alice"), free_port()
    given = {"URL": f"http://127.0.0.1:{port}", "TIMEOUT_S": "20", "MRSA_KEY": asks.secret}
    asked = await asyncio.create_subprocess_exec(
        sys.executable, CHART / "files/ask.py", env=given, stdout=asyncio.subprocess.PIPE
    )
    assert asked.stdout is not None
    assert b"not ready" in await asked.stdout.readline()
    async with on_port(at=port, keys=ring(asks)):
        said, _ = await asked.communicate()
    assert asked.returncode == 0, said


async def test_helm_s_test_says_why_it_got_no_answer() -> None:
    asks = client("alice")
    async with on_port(keys=ring(asks)) as (url, _):
        asked = await asyncio.create_subprocess_exec(
            sys.executable, CHART / "files/ask.py", env={"URL": url, "TIMEOUT_S": "20"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        said, _ = await asked.communicate()
    assert asked.returncode == 1
    assert b"401" in said


class Engine(BaseHTTPRequestHandler):
    """As vLLM's metrics: two generations are in flight for the first three looks."""

    looks = 0

    def do_GET(self) -> None:
        type(self).looks += 1
        running = 2.0 if self.looks <= 3 else 0.0
        text = f'# HELP x\nvllm:num_requests_running{{engine="0",model_name="m"}} {running}\n'
        text += 'vllm:num_requests_waiting{engine="0",model_name="m"} 0.0\n'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_engine_that_is_to_go_waits_for_its_last_generation() -> None:
    source = (CHART / "files/drain_engine.py").read_text()
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        source = source.replace(":8000/", f":{server.server_port}/").replace("time.sleep(", "time.sleep(0.01 * ")
        subprocess.run([sys.executable, "-c", source], check=True, timeout=20)
        assert Engine.looks == 6  # idle at three in a row
        server.shutdown()
    subprocess.run([sys.executable, "-c", source], check=True, timeout=20)  # nobody is there any more
