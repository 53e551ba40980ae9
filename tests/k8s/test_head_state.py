"""The state of the serving cluster's head may be in a managed Redis or on the head's volume, not in base's pod."""

from __future__ import annotations

import pytest
import yaml

from tests.support.manifests import K8S, build, build_with, cluster_of, only


@pytest.mark.parametrize("component", ["redis-managed", "gcs-rocksdb"])
def test_no_pod_of_redis_remains(component: str) -> None:
    manifests = build_with(component)
    names = {f"{m['kind']}/{m['metadata']['name']}" for m in manifests}
    assert not names & {"StatefulSet/genmodels-redis", "Service/genmodels-redis", "NetworkPolicy/redis"}
    assert "genmodels-redis:6379" not in yaml.safe_dump(manifests)


def test_a_managed_redis_is_reached_with_tls_and_the_password() -> None:
    options = cluster_of(only(build_with("redis-managed"), "RayService"))["gcsFaultToleranceOptions"]
    assert options["redisAddress"].startswith("rediss://")
    assert (
        options["redisPassword"]
        == cluster_of(only(build("base"), "RayService"))["gcsFaultToleranceOptions"]["redisPassword"]
    )


def test_rocksdb_needs_no_redis_at_all() -> None:
    """KubeRay refuses any field of Redis next to this backend (validateGcsFaultToleranceBackend)."""
    manifests = build_with("gcs-rocksdb")
    options = cluster_of(only(manifests, "RayService"))["gcsFaultToleranceOptions"]
    assert set(options) == {"backend", "storage"}
    assert options["backend"] == "rocksdb"
    assert "claimName" not in options["storage"], "the clusters of an upgrade would share one database"
    assert "to-redis" not in {m["metadata"]["name"] for m in manifests}


def test_the_guide_says_what_the_loss_of_redis_costs() -> None:
    """GCS exits after seconds, and the workers after KubeRay's default of 600 s."""
    guide = (K8S / "README.md").read_text()
    assert "While it is unavailable the serving cluster continues" not in guide
    assert "600 s" in guide[guide.index("### Redis") :]
