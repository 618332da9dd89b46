"""Kubernetes objects that serve a model repository from object storage.

An init container copies the repository into the pod, and the server is started by the repository's own launch script,
so that it runs with the very flags that it has anywhere else. The settings have the layout of a Helm chart's values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from effc.errors import UsageError
from effc.serving.backend_files import PACKAGES_VARIABLE
from effc.serving.launch import CONTAINER, LAUNCH_NAME
from effc.serving.requirements import REQUIREMENTS_NAME
from effc.suggest import did_you_mean

MODELS = "/models"
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
# Ordinary users of the images; nothing here needs more.
_USER = 1000
_DNS_NAME = r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"

# By scheme: an image with the storage's own command line, and the command that copies $SOURCE into $TARGET.
_COPIERS = {
    "s3": ("amazon/aws-cli:2.27.0", 'aws s3 sync --only-show-errors "$SOURCE" "$TARGET"'),
    "gs": ("google/cloud-sdk:521.0.0-slim", 'gcloud storage rsync --recursive "$SOURCE" "$TARGET"'),
    "as": ("mcr.microsoft.com/azure-cli:2.72.0", 'az storage copy --recursive -s "$SOURCE" -d "$TARGET"'),
}


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StorageValues(_Values):
    """Where the repository lies."""

    uri: str = Field(description="s3://BUCKET/PATH, gs://BUCKET/PATH or as://ACCOUNT/CONTAINER/PATH")
    image: str = Field("", description="image that copies; one for the kind of storage when empty")
    secret: str = Field("", description="Secret whose keys are environment variables with the credentials")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in _COPIERS:
            raise ValueError(f"'{value}' is not in object storage: write s3://BUCKET/PATH, gs://... or as://...")
        if not parts.netloc:
            raise ValueError(f"'{value}' names no bucket")
        return value


class ResourceValues(_Values):
    """What one pod gets."""

    cpu: str = "2"
    memory: str = "4Gi"
    gpus: int = Field(0, ge=0, description="of NVIDIA, for engines and --instances gpu")
    shared_memory: str = Field("1Gi", description="that Triton's python models pass tensors through")


class ServiceValues(_Values):
    """How the pods are reached."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"


class AutoscalingValues(_Values):
    """More pods under load."""

    enabled: bool = False
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    cpu_percent: int = Field(70, ge=1, le=100, description="of the CPU asked for, that pods are kept at")


class KubernetesValues(_Values):
    """Everything that can be said."""

    storage: StorageValues
    name: str = Field("effc", pattern=_DNS_NAME, description="of all objects")
    namespace: str = Field("default", pattern=_DNS_NAME)
    replicas: int = Field(1, ge=1)
    image: str = Field(CONTAINER, description="with tritonserver in PATH")
    packages: str = Field(
        f"-r {MODELS}/{REQUIREMENTS_NAME}",
        description="that pip installs before the server starts, as the repository says; empty for an image with them",
    )
    service_account: str = Field("", description="one that may read the storage, in place of a secret")
    resources: ResourceValues = ResourceValues()
    service: ServiceValues = ServiceValues()
    autoscaling: AutoscalingValues = AutoscalingValues()
    node_selector: dict[str, str] = Field(default_factory=dict)
    startup_seconds: int = Field(900, ge=30, description="that copying, installing and loading may take")


def read_values(uri: str | None, file: str | Path | None = None) -> KubernetesValues:
    """The settings of a YAML file; ``uri`` overrides its ``storage.uri``.

    Raises:
        UsageError: if the file cannot be read or a setting is not valid.
    """
    given: dict[str, Any] = {}
    if file is not None:
        try:
            given = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"'{file}' cannot be read: {error}.", "Give a YAML file of values.") from None
        if not isinstance(given, dict):
            raise UsageError(f"'{file}' holds no values.", "Write `key: value` lines; --show-values prints them all.")
    if uri is not None:
        given["storage"] = {**(given.get("storage") or {}), "uri": uri}
    try:
        return KubernetesValues.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        if where == "storage":
            raise UsageError("It is not said where the repository lies.", "Give s3://BUCKET/PATH.") from None
        remedy = "`effc kubernetes --show-values` prints every key with its default."
        if detail["type"] == "extra_forbidden":
            known = _section(detail["loc"][:-1]).model_fields
            raise UsageError(f"There is no value '{where}'.", did_you_mean(str(detail["loc"][-1]), known)) from None
        raise UsageError(f"'{where}' is not valid: {detail['msg'].removeprefix('Value error, ')}.", remedy) from None


def manifest(values: KubernetesValues) -> str:
    """The objects as YAML: a Deployment, a Service, and what ``autoscaling`` and several replicas ask for."""
    objects = [_deployment(values), _service(values)]
    if values.autoscaling.enabled:
        objects.append(_autoscaler(values))
    if values.replicas > 1 or values.autoscaling.enabled:
        objects.append(_disruption_budget(values))
    return yaml.safe_dump_all(objects, sort_keys=False)


def _section(path: tuple[int | str, ...]) -> type[BaseModel]:
    section: Any = KubernetesValues
    for key in path:
        section = section.model_fields[key].annotation
    found: type[BaseModel] = section
    return found


def _metadata(values: KubernetesValues) -> dict[str, Any]:
    return {"name": values.name, "namespace": values.namespace, "labels": _labels(values)}


def _labels(values: KubernetesValues) -> dict[str, str]:
    return {"app.kubernetes.io/name": "effc", "app.kubernetes.io/instance": values.name}


def _deployment(values: KubernetesValues) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "automountServiceAccountToken": bool(values.service_account),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Requests that are under way are answered first; launch.sh gives them 20 seconds.
        "terminationGracePeriodSeconds": 40,
        "initContainers": [_copier(values)],
        "containers": [_server(values)],
        "volumes": [
            {"name": "models", "emptyDir": {}},
            {"name": "home", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": values.resources.shared_memory}},
        ],
    }
    if values.service_account:
        pod["serviceAccountName"] = values.service_account
    if values.node_selector:
        pod["nodeSelector"] = dict(values.node_selector)
    spec: dict[str, Any] = {
        "selector": {"matchLabels": _labels(values)},
        "template": {"metadata": {"labels": _labels(values)}, "spec": pod},
    }
    if not values.autoscaling.enabled:
        # An autoscaler's own number of replicas is not to be overwritten.
        spec = {"replicas": values.replicas, **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(values), "spec": spec}


def _copier(values: KubernetesValues) -> dict[str, Any]:
    storage, parts = values.storage, urlsplit(values.storage.uri)
    image, command = _COPIERS[parts.scheme]
    source = storage.uri.rstrip("/")
    if parts.scheme == "as":
        source = f"https://{parts.netloc}.blob.core.windows.net{parts.path.rstrip('/')}/*"
    copier: dict[str, Any] = {
        "name": "copy-repository",
        "image": storage.image or image,
        "command": ["sh", "-c", f"set -eu; {command}; test -s {MODELS}/{LAUNCH_NAME}"],
        "env": [
            {"name": "SOURCE", "value": source},
            {"name": "TARGET", "value": MODELS},
            {"name": "HOME", "value": "/home/effc"},
        ],
        "volumeMounts": [_mount("models", MODELS), _mount("home", "/home/effc")],
        "securityContext": _CONFINED,
    }
    if storage.secret:
        copier["envFrom"] = [{"secretRef": {"name": storage.secret}}]
    return copier


def _server(values: KubernetesValues) -> dict[str, Any]:
    start = f"exec sh {MODELS}/{LAUNCH_NAME}"
    if values.packages:
        start = f'pip install --target "${PACKAGES_VARIABLE}" --quiet {values.packages}; {start}'
    limits = {"cpu": values.resources.cpu, "memory": values.resources.memory}
    if values.resources.gpus:
        limits["nvidia.com/gpu"] = str(values.resources.gpus)
    period = 10
    return {
        "name": "triton",
        "image": values.image,
        "command": ["sh", "-c", f"set -eu; {start}"],
        "env": [
            {"name": "ADDRESS", "value": "0.0.0.0"},
            {"name": "HOME", "value": "/home/effc"},
            {"name": PACKAGES_VARIABLE, "value": "/home/effc/packages"},
        ],
        "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
        "resources": {"requests": dict(limits), "limits": limits},
        "startupProbe": {
            "httpGet": {"path": "/v2/health/ready", "port": "http"},
            "periodSeconds": period,
            "failureThreshold": -(-values.startup_seconds // period),
        },
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/v2/health/live", "port": "http"}, "periodSeconds": period},
        "volumeMounts": [
            {**_mount("models", MODELS), "readOnly": True},
            _mount("home", "/home/effc"),
            _mount("shared-memory", "/dev/shm"),
        ],
        "securityContext": _CONFINED,
    }


_CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _mount(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "mountPath": path}


def _service(values: KubernetesValues) -> dict[str, Any]:
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in PORTS.items()]
    spec = {"type": values.service.type, "selector": _labels(values), "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(values), "spec": spec}


def _autoscaler(values: KubernetesValues) -> dict[str, Any]:
    scaling = values.autoscaling
    target = {"type": "Utilization", "averageUtilization": scaling.cpu_percent}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": values.name},
        "minReplicas": scaling.min_replicas,
        "maxReplicas": max(scaling.min_replicas, scaling.max_replicas),
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(values),
        "spec": spec,
    }


def _disruption_budget(values: KubernetesValues) -> dict[str, Any]:
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": _labels(values)}}
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(values), "spec": spec}


def describe_values() -> str:
    """Every value with its default and what it means, as YAML."""
    return "\n".join(_described(KubernetesValues, "")) + "\n"


def _described(section: type[BaseModel], indent: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"{indent}{name}:", *_described(kind, f"{indent}  ")]
            continue
        default = field.get_default(call_default_factory=True)
        text = "s3://BUCKET/PATH" if field.is_required() else yaml.safe_dump(default, width=10_000).splitlines()[0]
        lines.append(f"{indent}{name}: {text}" + (f"  # {field.description}" if field.description else ""))
    return lines
