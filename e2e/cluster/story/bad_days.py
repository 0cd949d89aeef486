"""Mistakes, attacks and accidents: each has an outcome that is said."""

import json
import subprocess
import threading

from .driving import (
    AGENTS, ask, captured, client_on, controller_page, enrolled, expect, get, HERE, kubectl, metrics, on, pods, status, SYSTEM, until,
)


def pod_named(name, namespace="shop", labels=None, command=("sleep", "infinity"), containers=("one",), node="node1", **spec):
    """A pod that ends at once when it is told to."""
    spec |= {"terminationGracePeriodSeconds": 0, "nodeName": node, "containers": [
        {"name": c, "image": "localhost/apps:1", "command": list(command)} for c in containers]}
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def apply(*objects):
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


def namespace_named(name, labels):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def left_out(story):
    "a pod with sockmesh.io/mesh=disabled, one in the host's network and one with a sidecar stay out, the latter two are listed"
    made = [pod_named("opted-out", labels={"sockmesh.io/mesh": "disabled"}), pod_named("on-host", hostNetwork=True),
            pod_named("sidecar", containers=("one", "istio-proxy"))]
    names = [p["metadata"]["name"] for p in made]
    try:
        apply(*made)
        kubectl("wait", "-n", "shop", "--for=condition=Ready", "--timeout=60s", *(f"pod/{n}" for n in names))
        uids = {get("pod", "-n", "shop", n)["metadata"]["uid"] for n in names}
        expect(not uids & captured("node1"), "one of them is captured")
        listed = controller_page("/debug/uncovered")
        for name in ["on-host", "sidecar"]:
            expect(name in listed, f"{name} is not in /debug/uncovered: {listed}")
    finally:
        kubectl("delete", "pod", "-n", "shop", *names, "--ignore-not-found")


def no_agent(story):
    "on a node without an agent a pod of the mesh does not start, its event says why, and others do"
    selector = {"spec": {"template": {"spec": {"nodeSelector": {"example.com/nowhere": "yes"}}}}}
    kubectl("patch", "daemonset", "-n", SYSTEM, "sockmesh-node", "-p", json.dumps(selector))
    try:
        until("no agents", lambda: not get("pods", "-n", SYSTEM, "-l", AGENTS)["items"])
        for namespace in ["shop", "outside"]:
            kubectl("run", "-n", namespace, "late", "--image=localhost/apps:1", "--restart=Never", "--command", "--", "sleep", "600")
        kubectl("wait", "-n", "outside", "pod/late", "--for=condition=Ready", "--timeout=60s")

        def told():
            events = get("events", "-n", "shop", "--field-selector", "involvedObject.name=late,reason=FailedCreatePodSandBox")["items"]
            return next((e["message"] for e in events if "no agent of the mesh answers on this node" in e["message"]), None)
        until("an event that says why", told)
        expect(get("pod", "-n", "shop", "late")["status"]["phase"] == "Pending", "it runs")
    finally:
        kubectl("patch", "daemonset", "-n", SYSTEM, "sockmesh-node", "--type=json", "-p",
                '[{"op": "remove", "path": "/spec/template/spec/nodeSelector/example.com~1nowhere"}]')
    kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=90s")
    kubectl("wait", "-n", "shop", "pod/late", "--for=condition=Ready", "--timeout=90s")
    until("all captured", enrolled)
    for namespace in ["shop", "outside"]:
        kubectl("delete", "pod", "-n", namespace, "late", "--grace-period=0", "--wait=false")


def labels(story):
    "an unknown value of the label, and a namespace of two meshes: nobody joins, and both are said"
    apply(namespace_named("odd", {"sockmesh.io/mesh": "yes"}), pod_named("both-meshes", "odd"))
    try:
        kubectl("wait", "-n", "odd", "pod/both-meshes", "--for=condition=Ready", "--timeout=60s")
        uid = get("pod", "-n", "odd", "both-meshes")["metadata"]["uid"]
        until("the value is said to be unknown", lambda: "neither" in controller_page("/debug/problems"))
        expect(uid not in captured("node1"), "a pod is captured because of an unknown value")
        kubectl("label", "namespace", "odd", "--overwrite", "sockmesh.io/mesh=enabled", "istio.io/dataplane-mode=ambient")
        until("the pod is listed", lambda: "odd/both-meshes is in Istio's ambient mode" in controller_page("/debug/uncovered"))
        expect("neither" not in controller_page("/debug/problems"), "a problem that was mended is still said")
        expect(uid not in captured("node1"), "a pod of another mesh is captured")
    finally:
        kubectl("delete", "namespace", "odd", "--timeout=60s")


def endpoints(story):
    "a Service with nobody behind it refuses at once, and another namespace's pod behind one stays who it is, which is said"
    def service(name, **spec):
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
                "spec": {"ports": [{"name": "http", "port": 80}], **spec}}
    apply(namespace_named("odd", {"sockmesh.io/mesh": "enabled"}), pod_named("other", "odd", command=["web"]))
    client = client_on("node1")
    try:
        kubectl("wait", "-n", "odd", "pod/other", "--for=condition=Ready", "--timeout=60s")
        other = get("pod", "-n", "odd", "other")
        address = other["status"]["podIP"]
        until("an answer", lambda: "pod=other" in ask(client, address, fails=True))
        apply(service("nobody", selector={"app": "nobody"}), service("foreign"), {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "foreign-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "foreign"}},
            "ports": [{"name": "http", "port": 80}], "endpoints": [{"addresses": [address], "conditions": {"ready": True}}]})
        until("the foreign endpoint is said", lambda: f"{address} is the address of pod odd/other" in controller_page("/debug/problems"))
        until("an answer", lambda: "pod=other" in ask(client, "foreign", fails=True))
        principals = {labels["destination_principal"] for _, labels, _ in metrics("node1")
                      if labels.get("destination_service_name") == "foreign" and labels["reporter"] == "source"}
        expect(principals == {"spiffe://cluster.local/ns/odd/sa/default"}, f"who answered for the Service is said to be {principals}")
        until("a refusal", lambda: "Failed to connect" in ask(client, "nobody", fails=True))
    finally:
        kubectl("delete", "service", "-n", "shop", "nobody", "foreign", "--ignore-not-found")
        kubectl("delete", "endpointslice", "-n", "shop", "foreign-1", "--ignore-not-found")
        kubectl("delete", "namespace", "odd", "--timeout=60s")


def agent_of(node):
    return next(p for p in pods(AGENTS, SYSTEM) if p["spec"]["nodeName"] == node)


def refused_with(token):
    """What the controller says to an agent on node1 that says to be node2's and shows the token of this file."""
    agent = agent_of("node1")["metadata"]["name"]
    own = ["--node-name=node2", "--run-dir=/run/sockmesh/thief", "--state-dir=/var/lib/sockmesh/thief"]
    address = f"sockmesh-controller.{SYSTEM}.svc"
    thief = subprocess.Popen(
        [HERE / "bin/kubectl", "exec", "-n", SYSTEM, agent, "--", "sockmesh-node", "agent", *own, "--cgroup=/host/cgroup",
         "--admin=127.0.0.1:15021", f"--controller={address}:15012", f"--controller-name={address}",
         "--controller-ca=/var/run/sockmesh/trust/root.pem", f"--token-file={token}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # One that says neither is not waited for for ever.
    limit = threading.Timer(60, thief.kill)
    limit.start()
    try:
        refused = next((line for line in thief.stdout if "cannot register" in line or "has a certificate" in line), "")
    finally:
        limit.cancel()
        kubectl("exec", "-n", SYSTEM, agent, "--", "sockmesh-node", "uninstall", *own)
        thief.wait(timeout=30)
    expect("cannot register" in refused, f"it was not refused: {refused}")
    return refused.split("error=")[-1].strip()


def stolen_token(story):
    "the token of one node's agent is refused when another node shows it"
    refused = refused_with("/var/run/secrets/sockmesh/token")
    expect("node1, not on" in refused, refused)
    return refused[:200]


def other_audience(story):
    "a token of the agent's that was made for somebody else is refused"
    agent = agent_of("node2")["metadata"]["name"]
    token = kubectl("create", "token", "-n", SYSTEM, "sockmesh-node", "--audience=somebody-else",
                    "--bound-object-kind=Pod", f"--bound-object-name={agent}")
    refused = refused_when_shown(token)
    expect("audience" in refused, refused)
    return refused[:200]


def refused_when_shown(token):
    """The same with a token."""
    on("node1", "tee", "/run/sockmesh/other-token", stdin=token)
    try:
        return refused_with("/run/sockmesh/other-token")
    finally:
        on("node1", "rm", "/run/sockmesh/other-token")


def retired_token(story):
    "the token of an agent whose pod is gone is refused, long before it expires"
    agent = agent_of("node2")["metadata"]
    token = on("node2", "cat", f"/var/lib/kubelet/pods/{agent['uid']}/volumes/kubernetes.io~projected/token/token")
    kubectl("delete", "pod", "-n", SYSTEM, agent["name"], "--timeout=90s")
    kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=90s")
    refused = refused_when_shown(token)
    expect("is not a running agent of node node2" in refused or "does not accept the token" in refused, refused)
    until("all captured", enrolled)
    return refused[:200]


def full_disk(story):
    "a node's disk is full: its pods go on, new ones join, it is said, and mended when there is room"
    state = "/var/lib/sockmesh"

    def restart_agent():
        kubectl("delete", "pod", "-n", SYSTEM, "-l", AGENTS, "--field-selector=spec.nodeName=node1")
        kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=90s")

    def problems():
        return [said for said in status("node1")["status"]["problems"] if "make room on the disk" in said]
    # With room for all that the node keeps, which is more the more pods have gone before: their certificates are denied for a day.
    on("node1", "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", state)
    try:
        on("node1", "dd", "if=/dev/zero", f"of={state}/filler", "bs=4k", fails=True)
        restart_agent()
        until("all captured", enrolled)
        apply(pod_named("newcomer"))
        kubectl("wait", "-n", "shop", "pod/newcomer", "--for=condition=Ready", "--timeout=60s")
        until("the new one captured", enrolled)
        expect("pod=web" in ask(client_on("node1"), "web"), "no answer")
        until("it is said", problems)
        on("node1", "rm", f"{state}/filler")
        # At the next look at what could not be written.
        until("it is on disk", lambda: on("node1", "test", "-s", f"{state}/pods.json", "-a", "-s", f"{state}/config") == "", 60)
        until("it is not said any more", lambda: not problems())
    finally:
        kubectl("delete", "pod", "-n", "shop", "newcomer", "--ignore-not-found")
        on("node1", "umount", "--lazy", state)
        restart_agent()
        until("all captured", enrolled)
