"""Kubernetes objects for a repository in object storage, checked against the schemas of the API server."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from effc import cli
from effc.errors import UsageError
from effc.serving.kubernetes import KubernetesValues, describe_values, manifest, read_values
from effc.serving.launch import LAUNCH_NAME, launch_script

VERSIONS = ("1.28", kubernetes_validate.latest_version())


def objects(tmp_path: Path, uri: str = "s3://bucket/models", **values: object) -> dict[str, dict]:
    """By kind; each is what the API server of old and new versions takes."""
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    made = list(yaml.safe_load_all(manifest(read_values(uri, file))))
    for one in made:
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)
    return {one["kind"]: one for one in made}


def test_the_repository_is_copied_and_started_by_its_own_script(tmp_path: Path) -> None:
    made = objects(tmp_path)
    assert set(made) == {"Deployment", "Service"}
    pod = made["Deployment"]["spec"]["template"]["spec"]
    (copier,), (server,) = pod["initContainers"], pod["containers"]
    assert {entry["name"]: entry["value"] for entry in copier["env"]}["SOURCE"] == "s3://bucket/models"
    assert "aws s3 sync" in copier["command"][2]
    assert f"/models/{LAUNCH_NAME}" in server["command"][2]
    # What the script reads is what the pod says.
    environment = {entry["name"]: entry["value"] for entry in server["env"]}
    assert environment["ADDRESS"] == "0.0.0.0" and "ADDRESS" in launch_script(cache=False)
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert all(f"{port}" in launch_script(cache=False) for port in ports.values())
    assert made["Service"]["spec"]["selector"] == made["Deployment"]["spec"]["selector"]["matchLabels"]
    assert {port["targetPort"] for port in made["Service"]["spec"]["ports"]} == set(ports)
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["models"]["readOnly"] and {volume["name"] for volume in pod["volumes"]} >= set(mounts)
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]


@pytest.mark.parametrize(
    ("uri", "source", "command"),
    [
        ("gs://bucket/a/b/", "gs://bucket/a/b", "gcloud storage rsync"),
        ("as://account/container/a", "https://account.blob.core.windows.net/container/a/*", "az storage copy"),
    ],
)
def test_kinds_of_storage(uri: str, source: str, command: str, tmp_path: Path) -> None:
    (copier,) = objects(tmp_path, uri)["Deployment"]["spec"]["template"]["spec"]["initContainers"]
    assert {entry["name"]: entry["value"] for entry in copier["env"]}["SOURCE"] == source
    assert command in copier["command"][2]


def test_values_arrive(tmp_path: Path) -> None:
    made = objects(
        tmp_path,
        name="minilm",
        namespace="search",
        packages="",
        storage={"secret": "keys", "image": "own/copier:1"},
        resources={"gpus": 2, "memory": "16Gi", "shared_memory": "2Gi"},
        service={"type": "LoadBalancer"},
        service_account="reader",
        autoscaling={"enabled": True, "min_replicas": 2, "max_replicas": 9, "cpu_percent": 55},
        node_selector={"gpu": "l4"},
        startup_seconds=61,
    )
    assert set(made) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    assert {one["metadata"]["namespace"] for one in made.values()} == {"search"}
    spec = made["Deployment"]["spec"]
    # The autoscaler's number would be overwritten by every apply.
    assert "replicas" not in spec
    pod = spec["template"]["spec"]
    (copier,), (server,) = pod["initContainers"], pod["containers"]
    assert copier["envFrom"] == [{"secretRef": {"name": "keys"}}] and copier["image"] == "own/copier:1"
    assert "pip" not in server["command"][2]
    assert server["resources"]["limits"] == {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": "2"}
    assert server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] >= 61
    assert pod["nodeSelector"] == {"gpu": "l4"} and pod["serviceAccountName"] == "reader"
    scaler = made["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 9)
    assert scaler["scaleTargetRef"]["name"] == made["Deployment"]["metadata"]["name"] == "minilm"
    assert made["Service"]["spec"]["type"] == "LoadBalancer"


@pytest.mark.parametrize(
    ("uri", "values", "message"),
    [
        (None, "name: a", "not said where the repository lies.*s3://"),
        ("/models", "", "storage.uri.*'/models' is not in object storage"),
        ("s3:///x", "", "names no bucket"),
        ("s3://b", "nam: x", "(?s)no value 'nam'.*name"),
        ("s3://b", "resources: {gpu: 1}", "(?s)no value 'resources.gpu'.*gpus"),
        ("s3://b", "name: Not_A_Name", "'name' is not valid.*--show-values"),
        ("s3://b", "replicas: 0", "'replicas' is not valid"),
        ("s3://b", "[1]", "holds no values"),
        ("s3://b", "a: [", "cannot be read"),
    ],
)
def test_bad_values_are_refused(uri: str | None, values: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(values)
    with pytest.raises(UsageError, match=message):
        read_values(uri, file)


def test_shown_values_are_the_defaults() -> None:
    shown = yaml.safe_load(describe_values())
    assert KubernetesValues.model_validate(shown) == KubernetesValues.model_validate(
        {"storage": {"uri": "s3://BUCKET/PATH"}}
    )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["s3://b/m"], "kind: Deployment"),
        (["s3://b/m", "-o", str(tmp_path / "out.yaml")], "kubectl apply"),
        (["--show-values"], "startup_seconds: 900"),
        (["s3://b/m", "--json"], '"uri": "s3://b/m"'),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(["kubernetes", *arguments])
        assert done.value.code == 0
        assert expected in capsys.readouterr().out
    assert "kind: Service" in (tmp_path / "out.yaml").read_text()
