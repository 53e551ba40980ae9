"""Policies let pods reach what they need on common clusters, and nothing of a node's own credentials."""

from __future__ import annotations

import ipaddress

import pytest

from tests.support.manifests import K8S, Manifest, PodTemplate, build, build_with, only, pods, selects

API_SERVERS = [("10.96.0.1", 443), ("192.168.1.4", 6443), ("172.16.0.2", 8443), ("10.1.0.9", 16443)]
CREDENTIALS_OF_NODES = [("169.254.169.254", 80), ("fd00:ec2::254", 80)]
JOBS, HOSTS, TRAINING = "Deployment/genmodels-jobs", "RayService/genmodels/hosts", "RayJob/genmodels-template/workers"


def reaches(manifests: list[Manifest], of: str, address: str, port: int, protocol: str = "TCP") -> bool:
    """Tell whether a pod may open a connection to an address outside of the cluster."""
    (pod,) = [pod for pod in pods(manifests) if pod.of == of]
    rules = [rule for policy in _policies(manifests, pod) for rule in policy.get("egress", ())]
    return any(_to(rule, address) and _port(rule, port, protocol) for rule in rules)


def test_the_api_server_may_have_any_port() -> None:
    manifests = build("base")
    head = "RayService/genmodels/head"  # its autoscaler
    assert all(reaches(manifests, of, *server) for of in (JOBS, head) for server in API_SERVERS)
    assert not [server for server in API_SERVERS[1:] if reaches(manifests, TRAINING, *server)]


@pytest.mark.parametrize(
    ("component", "of", "address", "port", "protocol"),
    [
        ("network-node-local-dns", TRAINING, "169.254.20.10", 53, "UDP"),
        ("network-node-local-dns", HOSTS, "169.254.169.254", 53, "UDP"),
        ("network-eks-pod-identity", HOSTS, "169.254.170.23", 80, "TCP"),
        ("network-eks-pod-identity", JOBS, "fd00:ec2::23", 80, "TCP"),
        ("network-ipv6", HOSTS, "2001:db8::1", 443, "TCP"),
        ("network-ipv6", JOBS, "2001:db8::2", 6443, "TCP"),
        ("redis-managed", "RayService/genmodels/head", "10.9.8.7", 6379, "TCP"),
    ],
)
def test_a_component_opens_what_it_is_for(component: str, of: str, address: str, port: int, protocol: str) -> None:
    assert reaches(build_with(component), of, address, port, protocol)
    if of != "RayService/genmodels/head":  # the head may reach any address anyway, because of the API server
        assert not reaches(build("base"), of, address, port, protocol)


COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())


@pytest.mark.parametrize("component", COMPONENTS)
def test_nothing_opens_the_credentials_of_nodes(component: str) -> None:
    manifests = build_with(component)
    for of in (JOBS, HOSTS, TRAINING):
        assert not [server for server in CREDENTIALS_OF_NODES if reaches(manifests, of, *server)], of


def test_openshift_asks_its_own_dns() -> None:
    (rule,) = only(build_with("network-openshift-dns"), "NetworkPolicy", "dns")["spec"]["egress"]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "openshift-dns"}}}]
    assert {port["port"] for port in rule["ports"]} == {5353}
    assert only(build("overlays/openshift"), "NetworkPolicy", "dns")["spec"]["egress"] == [rule]


def test_cilium_lets_the_same_pods_reach_the_api_server() -> None:
    manifests = build_with("network-cilium")
    own = only(manifests, "CiliumNetworkPolicy")["spec"]
    assert own["egress"] == [{"toEntities": ["kube-apiserver"]}]
    assert own["endpointSelector"] == only(manifests, "NetworkPolicy", "kubernetes-api")["spec"]["podSelector"]


def test_the_guide_has_every_component_of_the_network() -> None:
    guide = (K8S / "README.md").read_text()
    assert all(f"| `{name}` |" in guide for name in COMPONENTS if name.startswith("network-"))


def _policies(manifests: list[Manifest], pod: PodTemplate) -> list[Manifest]:
    specs = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    return [spec for spec in specs if selects(spec["podSelector"], pod)]


def _to(rule: Manifest, address: str) -> bool:
    blocks = [peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer]
    return any(
        _in(address, block["cidr"]) and not any(_in(address, out) for out in block.get("except", ()))
        for block in blocks
    )


def _in(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def _port(rule: Manifest, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return ports is None or any((each["port"], each.get("protocol", "TCP")) == (port, protocol) for each in ports)
