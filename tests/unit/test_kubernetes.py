"""deploy/kubernetes: valid by Kubernetes' own schemas, with settings and users that the services know.

The schemas are those of Kubernetes 1.32 (Apache-2.0) as the package kubernetes-validate ships them, of the
kinds that are used here, without descriptions; fields that they do not know are refused.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings
from shared.bus.permissions import Role

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMAS = json.loads((ROOT / "tests" / "support" / "kubernetes_schemas.json").read_text())
SETTINGS = (GatewaySettings, SchedulerSettings, StageWorkerSettings, TrainerSettings)
Resource = dict[str, Any]


def kustomization() -> Resource:
    content: Resource = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return content


def resources() -> list[Resource]:
    return [
        resource
        for name in kustomization()["resources"]
        for resource in yaml.safe_load_all((FOLDER / name).read_text())
    ]


def workloads() -> dict[str, Resource]:
    return {
        resource["metadata"]["name"]: resource
        for resource in resources()
        if resource["kind"] in ("Deployment", "StatefulSet")
    }


def faults_of(resource: Resource) -> list[str]:
    name = SCHEMAS["kinds"][f"{resource['apiVersion']}/{resource['kind']}"]
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(resource)]


def test_every_resource_is_valid_by_the_schemas_of_kubernetes() -> None:
    for resource in resources():
        assert faults_of(resource) == [], resource["metadata"]["name"]


@pytest.mark.parametrize("fault", [{"replicas": "two"}, {"replica": 2}])
def test_the_schemas_find_wrong_values_and_unknown_fields(fault: dict[str, object]) -> None:
    trainer = workloads()["trainer"]
    assert faults_of(trainer | {"spec": trainer["spec"] | fault})


def test_every_workload_is_confined_probed_and_limited() -> None:
    for name, workload in workloads().items():
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["automountServiceAccountToken"] is False, name
        (container,) = pod["containers"]
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] is True, name
        assert confined["allowPrivilegeEscalation"] is False, name
        assert confined["capabilities"] == {"drop": ["ALL"]}, name
        assert container["resources"]["limits"]["memory"], name
        assert {"startupProbe", "livenessProbe"} <= set(container), name


def test_every_workload_has_a_disruption_budget_and_selects_its_own_pods() -> None:
    budgets = {
        resource["spec"]["selector"]["matchLabels"]["app"]
        for resource in resources()
        if resource["kind"] == "PodDisruptionBudget"
    }
    assert budgets == set(workloads())
    for workload in workloads().values():
        spec = workload["spec"]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_each_mounts_what_it_declares_and_the_nats_users_of_its_own_role() -> None:
    roles = {
        "gateway": {"gateway", "ingest"},
        "scheduler": {"scheduler"},
        "trainer": {"trainer"},
        "node": {"stage_worker"},
    }
    assert {role for of_one in roles.values() for role in of_one} < {role.value for role in Role}
    for name, workload in workloads().items():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}, name
        users = {place.rpartition("/")[2] for place in mounts.values() if "/nats_users/" in place}
        assert users == roles[name]


def test_every_setting_is_one_that_services_read() -> None:
    known = {f"LEMIX_{field.upper()}" for kind in SETTINGS for field in kind.model_fields} | {
        "HF_HOME",
        "HF_TOKEN",
    }
    (generated,) = kustomization()["configMapGenerator"]
    lines = [line for file in generated["envs"] for line in (FOLDER / file).read_text().split()]
    given = {line.partition("=")[0] for line in lines}
    for workload in workloads().values():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        (source,) = container["envFrom"]
        assert source["configMapRef"]["name"] == generated["name"]
        assert container["command"][2].startswith("services.")
        given |= {variable["name"] for variable in container.get("env", ())}
    assert given <= known
