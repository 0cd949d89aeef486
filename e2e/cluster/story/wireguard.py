"""The tunnel between nodes: what mutual TLS does not carry crosses encrypted, too, or not at all."""

import contextlib
import json
import secrets
import subprocess
import time

from .bad_days import agent_of, apply, pod_named
from .driving import (
    ask, Capture, client_on, curl, DUAL_STACK, enrolled, expect, get, HERE, helm, kubectl, Load, metrics, NODES, on, pods, REPOSITORY,
    sockmesh, SYSTEM, total, until, web_on,
)

# Addresses of pods, and what pods may send each other across nodes outside of the tunnel: mutual TLS.
PODS = ["10.244.0.0/16"] + (["fd99:244::/48"] if DUAL_STACK else [])
CLEAR = " or ".join(f"(src net {range_} and dst net {range_})" for range_ in PODS)
CLEAR, MESH = f"({CLEAR}) and not tcp port 15008", f"({CLEAR}) and tcp port 15008"
TUNNEL = "udp portrange 51871-51874"
# Datagrams, of a hundred in a second, that may be lost while the nodes' proxies, and with them the ends of the tunnel, are
# replaced: those that are on their way to an end that goes. 2 were when this was written.
LOST_WITH_AGENTS = 20


def upgrade(**values):
    """The release with these values, and nothing else but the cluster's own."""
    given = [word for name, value in values.items() for word in ["--set", f"wireguard.{name}={value}"]]
    helm("upgrade", "sockmesh", REPOSITORY / "charts/sockmesh", "--namespace", SYSTEM,
         "--values", REPOSITORY / "charts/test/cluster.yaml", *given, "--wait", "--timeout", "180s")
    until("all captured", enrolled)


def reports():
    """What `sockmesh wireguard status` says, by node. It fails when a node complains of something."""
    return json.loads(sockmesh("wireguard", "status", "-o", "json"))


def connected():
    """Whether every node's keys are registered, and it knows every other node's."""
    told = reports()
    return set(told) == set(NODES) and all(
        report and report["registration"] == "registered" and set(report["tunnel"]["peers"]) == set(NODES) - {node}
        for node, report in told.items())


def neighbour():
    """Addresses of the pod on node2 that is in no mesh; it has a page and sends datagrams back."""
    return [ip["ip"] for ip in get("pod", "-n", "outside", "neighbour")["status"]["podIPs"]]


def datagrams(count=20, size=1200, address=None, text="datagram"):
    """How many came back of those that a pod on node1 sent to one on node2."""
    told = kubectl("exec", "-n", "shop", client_on("node1"), "--", "udp", "ask", address or neighbour()[0], "7777", text, str(count), str(size),
                   fails=True)
    expect("came back" in told, told)
    return int(told.split()[0])


def send_all(mark):
    """Everything that mutual TLS does not carry, from one node to the other with this mark in it, and that it was answered."""
    for address in neighbour():
        # The last one is larger than any packet, and crosses in fragments.
        for size in [40, 1200, 4000]:
            if ":" in address and size > 1280:
                # Who sends over IPv6 makes the fragments, and hears from the first ones how large they may be (RFC 8201).
                datagrams(3, size, address, mark)
            expect(datagrams(5, size, address, mark) == 5, f"datagrams of {size} bytes to {address} did not all come back")
        host = f"[{address}]" if ":" in address else address
        expect("pod=neighbour" in curl("stranger", f"http://{host}/{mark}", namespace="outside"), "TCP outside of the mesh: no answer")
        expect(" 0% packet loss" in kubectl("exec", "-n", "outside", "stranger", "--", "ping", "-c", "3", "-W", "2", address), "ICMP: no answer")
    server = pods("k8s-app=kube-dns", "kube-system")[0]
    asker = client_on(next(node for node in NODES if node != server["spec"]["nodeName"]))
    told = kubectl("exec", "-n", "shop", asker, "--", "nslookup", f"{mark}.shop.svc.cluster.local", fails=True)
    expect("NXDOMAIN" in told, f"DNS: {told}")


def crossed(mark):
    """Sends everything; what was on the wire: packets of pods in clear text, of the tunnel, of mutual TLS, and whether the mark was."""
    wire = Capture("ip or ip6")
    try:
        send_all(mark)
        expect("pod=web" in ask(client_on("node1"), f"{web_on('node2')['status']['podIP']}:8080"), "no answer within the mesh")
        time.sleep(0.5)
        wire.end()
        counted = [wire.packets(which) for which in [CLEAR, TUNNEL, MESH]]
    finally:
        recorded = wire.stop()
    return *counted, mark.encode() in recorded


def tunnel(story):
    "helm upgrade --set wireguard.enabled=true under load: every node has a tunnel to every other one, and no request fails"
    apply(pod_named("neighbour", "outside", command=["sh", "-c", "udp listen 7777 & exec web"], node="node2"))
    kubectl("wait", "-n", "outside", "pod/neighbour", "--for=condition=Ready", "--timeout=60s")
    clear, _, _, seen = crossed("before-the-tunnel")
    expect(clear and seen, "what is looked for on the wire is not found there without a tunnel")
    load = Load()
    upgrade(enabled="true")
    until("every node has a tunnel to every other one", connected)
    sent = load.unfailing()
    expect("node1" in sockmesh("wireguard", "status") and "node2" in sockmesh("wireguard", "status", "node1"), "the tables lack a node")
    sockmesh("check")
    return f"{reports()['node1']['tunnel']['mode']} space, MTU {reports()['node1']['tunnel']['mtu']}, {sent} requests"


def tunnel_carries(story):
    "DNS, datagrams, fragments, ICMP and TCP of pods that are in no mesh cross inside it; mutual TLS beside it; nothing in clear text"
    before = [total("sockmesh_wireguard_sent_packets_total", [node]) for node in NODES[:2]]
    clear, tunnelled, mesh, seen = crossed("tunnel-" + secrets.token_hex(8))
    expect(not clear, f"{len(clear)} packets between pods in clear text: {clear[:5]}")
    expect(not seen, "the mark was on the wire")
    expect(tunnelled and mesh, f"{len(tunnelled)} packets of the tunnel, {len(mesh)} of mutual TLS")
    for node, count in zip(NODES, before):
        until(f"{node} counts packets that it sent", lambda node=node, count=count: total("sockmesh_wireguard_sent_packets_total", [node]) > count)
    told = reports()
    for node in NODES[:2]:
        [other] = set(NODES[:2]) - {node}
        sessions = told[node]["tunnel"]["peers"][other]["sessions"]
        expect(any(session["sending"] and session["handshake_age"] is not None for session in sessions), f"{node}: {sessions}")
    return f"{len(tunnelled)} packets of the tunnel, {len(mesh)} of mutual TLS"


def strict_drops():
    """Packets that strict mode dropped on the first two nodes."""
    return sum(value for node in NODES[:2] for name, labels, value in metrics(node)
               if name == "sockmesh_wireguard_strict_packets_total" and labels["cause"].startswith("dropped"))


@contextlib.contextmanager
def led_past():
    """Has node1 lead what is for node2's pods past the tunnel."""
    past = ["priority", "15000", "to", "10.244.2.0/24", "lookup", "main"]
    on("node1", "ip", "rule", "add", *past)
    try:
        yield
    finally:
        on("node1", "ip", "rule", "del", *past)


def tunnel_strict(story):
    "with wireguard.strict=all a packet that is led past the tunnel is dropped and counted, and the mesh goes on"
    upgrade(enabled="true", strict="all")
    until("every node has a tunnel to every other one", connected)
    send_all("strict-and-well")
    before, mark = strict_drops(), "past-" + secrets.token_hex(8)
    with led_past():
        wire = Capture("net 10.244.0.0/16")
        try:
            expect(datagrams(5, 200, text=mark) == 0, "datagrams past the tunnel came back")
            stranger = curl("stranger", f"http://{neighbour()[0]}/{mark}", namespace="outside", fails=True)
            expect("pod=" not in stranger, f"TCP past the tunnel was answered: {stranger}")
            expect("pod=web" in ask(client_on("node1"), f"{web_on('node2')['status']['podIP']}:8080"), "no answer within the mesh")
        finally:
            recorded = wire.stop()
        expect(mark.encode() not in recorded, "the mark was on the wire")
        until("the drops are counted", lambda: strict_drops() >= before + 6, 10)
        dropped = strict_drops() - before
    until("answers again", lambda: datagrams(5) == 5)
    return f"{dropped:.0f} packets dropped"


class Datagrams:
    """Datagrams through the tunnel, up to a hundred in a second, while something happens."""

    def __init__(self):
        self.process = subprocess.Popen(
            [HERE / "bin/kubectl", "exec", "-i", "-n", "shop", client_on("node1"), "--", "udp", "ask", neighbour()[0], "7777", "while", "0", "200"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def lost(self):
        """How many of how many did not come back. It asks until its input ends."""
        told = self.process.communicate(timeout=60)[0]
        expect("came back" in told, told)
        words = told.split()
        sent = int(words[2])
        expect(sent > 200, f"only {sent} datagrams were sent")
        return sent - int(words[0]), sent


def tunnel_keys(story):
    "the nodes' keys are replaced on demand: no datagram is lost"
    before = {node: report["rotations"] for node, report in reports().items()}
    with Datagrams() as flow:
        for node in NODES:
            kubectl("exec", "-n", SYSTEM, agent_of(node)["metadata"]["name"], "--", "sockmesh-node", "rotate-tunnel")
        until("all have new keys", lambda: all(
            report["rotations"] > before[node] and not report["rotating"] for node, report in reports().items()))
        lost, sent = flow.lost()
    expect(lost == 0, f"{lost} of {sent} datagrams were lost")
    return f"{sent} datagrams"


def tunnel_agents(story):
    "a rolling restart of the nodes' proxies: what is in the tunnel goes on"
    with Datagrams() as flow:
        kubectl("rollout", "restart", "-n", SYSTEM, "daemonset/sockmesh-node")
        kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=120s")
        until("every node has a tunnel to every other one", connected)
        lost, sent = flow.lost()
    told = f"{lost} of {sent} datagrams were lost"
    expect(lost <= LOST_WITH_AGENTS, told)
    until("all captured", enrolled)
    return told


def tunnel_labelled(story):
    "with wireguard.includeMesh mutual TLS crosses inside it, too; with strict=labelled only what the label is on is dropped outside"
    upgrade(enabled="true", includeMesh="true", strict="labelled")
    until("every node has a tunnel to every other one", connected)
    clear, tunnelled, mesh, seen = crossed("all-inside-" + secrets.token_hex(8))
    expect(tunnelled and not clear and not mesh and not seen,
           f"{len(clear)} packets in clear text, {len(tunnelled)} of the tunnel, {len(mesh)} of mutual TLS: {(clear + mesh)[:5]}")
    with led_past():
        until("what nobody put the label on passes", lambda: datagrams(5) == 5)
        kubectl("label", "namespace", "outside", "sockmesh.io/wireguard=strict")
        try:
            until("what is for a pod with the label is dropped", lambda: datagrams(5) == 0)
        finally:
            kubectl("label", "namespace", "outside", "sockmesh.io/wireguard-")
        until("and passes without the label", lambda: datagrams(5) == 5)
    return f"{len(tunnelled)} packets of the tunnel"


def between_nodes():
    """What is on the wire of a process of node1 that asks one of node2 for a page: packets in clear text, and of the tunnel."""
    wire = Capture("host 10.99.0.11 and host 10.99.0.12")
    try:
        expect("sockmesh_" in on("node1", "curl", "-sf", "-m", "5", "http://10.99.0.12:15020/metrics"), "no page of node2")
        time.sleep(0.5)
        wire.end()
        return [wire.packets(which) for which in ["tcp port 15020", TUNNEL]]
    finally:
        wire.stop()


def tunnel_nodes(story):
    "with wireguard.nodeTraffic what processes of nodes say to each other crosses inside it; API server and kubelets go on as before"
    clear, _ = between_nodes()
    expect(clear, "what is looked for on the wire is not found there")
    upgrade(enabled="true", nodeTraffic="true")
    until("every node has a tunnel to every other one", connected)
    until("what nodes say is inside", lambda: not between_nodes()[0])
    clear, tunnelled = between_nodes()
    expect(tunnelled and not clear, f"{len(clear)} packets in clear text, {len(tunnelled)} of the tunnel")
    kubectl("wait", "node", "--all", "--for=condition=Ready", "--timeout=30s")
    for node in NODES:
        kubectl("exec", "-n", "shop", client_on(node), "--", "true")
    sockmesh("check")
    return f"{len(tunnelled)} packets of the tunnel"


def tunnel_off(story):
    "without wireguard.enabled no interface, rule or route of it is left, and packets cross as before"
    upgrade(enabled="false")
    for node in NODES:
        left = on(node, "bash", "-c", """
            ip -brief link | grep ^sockmesh_wg
            for family in -4 -6; do ip $family rule | grep ^1587[0-9]:; ip $family route show table 15871 2>/dev/null; ip $family route show table 15872 2>/dev/null; done; true""").strip()
        expect(not left, f"{node}: {left}")
    clear, tunnelled, mesh, seen = crossed("after-the-tunnel")
    expect(clear and seen and mesh and not tunnelled, f"{len(clear)} packets in clear text, {len(tunnelled)} of the tunnel, {len(mesh)} of mutual TLS")
    kubectl("delete", "pod", "-n", "outside", "neighbour")
