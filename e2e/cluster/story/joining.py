"""How the mesh comes, how applications join it and leave it, and how it goes."""

import json
import re
import secrets
import time

from .driving import (
    Capture, captured, client_on, curl, enrolled, expect, get, helm, HERE, kubectl, NODES, pods, REPOSITORY,
    sockmesh, stranger, SYSTEM, traces, until, web_on,
)


def plain(story):
    "a plain application runs without the mesh"
    kubectl("apply", "-f", HERE / "manifests/shop.yaml")
    kubectl("label", "namespace", "shop", "sockmesh.io/mesh-")
    kubectl("scale", "-n", "shop", "deployment/web", f"--replicas={len(NODES)}")
    kubectl("rollout", "status", "-n", "shop", "deployment/web", "daemonset/client", "--timeout=90s")
    kubectl("wait", "-n", "outside", "pod/stranger", "--for=condition=Ready", "--timeout=60s")
    kubectl("wait", "-n", "shop", "pod/entry", "--for=condition=Ready", "--timeout=60s")
    until("an answer", lambda: "pod=web" in stranger("http://web.shop/"))


def install(story):
    "helm install: controller and both nodes' agents get ready"
    helm("install", "sockmesh-crds", REPOSITORY / "charts/sockmesh-crds", "--namespace", SYSTEM, "--create-namespace")
    helm("install", "sockmesh", REPOSITORY / "charts/sockmesh", "--namespace", SYSTEM,
         "--values", REPOSITORY / "charts/test/cluster.yaml", "--wait", "--timeout", "120s")
    ready = get("daemonset", "-n", SYSTEM, "sockmesh-node")["status"]
    expect(ready.get("numberReady") == len(NODES), f"agents: {ready}")


def check_before(story):
    "sockmesh check --pre: the cluster is fit for the mesh"
    sockmesh("check", "--pre")


def check(story):
    "sockmesh status --wait comes to its end, and sockmesh check finds nothing wrong"
    sockmesh("status", "--wait", "--timeout", "60s")
    report = json.loads(sockmesh("check", "-o", "json"))
    return f"{len(report['findings'])} findings"


def helm_test(story):
    "helm test"
    helm("test", "sockmesh", "--namespace", SYSTEM, "--timeout", "90s")


def untouched(story):
    "before the label nothing is in the mesh"
    expect("pod=web" in stranger("http://web.shop/"), "the application is not as it was")
    # What is looked for on the wire is found there when it is there.
    wire, plain = Capture(), "plain-" + secrets.token_hex(8)
    address = web_on("node2")["status"]["podIP"]
    expect("pod=web" in curl(client_on("node1"), f"http://{address}:8080/{plain}"), "no answer")
    time.sleep(0.5)
    expect(plain.encode() in wire.stop(), "the capture misses plain requests")
    expect(not any(captured(node) for node in NODES), "pods are captured")


def label(story):
    "kubectl label namespace: running pods join without a restart"
    before = {p["metadata"]["uid"] for p in get("pods", "-n", "shop")["items"]}
    began = time.monotonic()
    kubectl("label", "namespace", "shop", "sockmesh.io/mesh=enabled")
    until("all pods captured", enrolled)
    took = time.monotonic() - began
    after = get("pods", "-n", "shop")["items"]
    expect({p["metadata"]["uid"] for p in after} == before, "there are other pods")
    expect(not any(c["restartCount"] for p in after for c in p["status"]["containerStatuses"]), "containers restarted")
    story.wire = Capture()
    return f"{len(after)} pods in {took:.1f} s"


def unlabel(story):
    "without the label the pods leave, without a restart"
    before = {p["metadata"]["uid"] for p in pods("app in (web, client)")}
    kubectl("label", "namespace", "shop", "sockmesh.io/mesh-")
    until("nobody captured", lambda: not any(captured(node) for node in NODES))
    until("an answer for somebody outside", lambda: "pod=web" in stranger("http://web.shop/"))
    expect("pod=web" in curl(client_on("node1"), "http://web/"), "no answer within")
    expect({p["metadata"]["uid"] for p in pods("app in (web, client)")} == before, "there are other pods")


def namespace(story):
    "a namespace of the mesh is deleted: its pods are forgotten"
    kubectl("create", "namespace", "brief")
    kubectl("label", "namespace", "brief", "sockmesh.io/mesh=enabled")
    kubectl("run", "-n", "brief", "one", "--image=localhost/apps:1", "--restart=Never", "--command", "--",
            "sh", "-c", "trap exit TERM; sleep 600 & wait")
    kubectl("wait", "-n", "brief", "pod/one", "--for=condition=Ready", "--timeout=60s")
    uid = get("pod", "-n", "brief", "one")["metadata"]["uid"]
    expect(any(uid in captured(node) for node in NODES), "the pod runs and is not captured")
    kubectl("delete", "namespace", "brief", "--timeout=90s")
    until("it is forgotten", lambda: not any(uid in captured(node) for node in NODES))


def uninstall(story):
    "helm uninstall while a namespace is in the mesh: nothing is left, and traffic flows plainly"
    kubectl("label", "namespace", "shop", "sockmesh.io/mesh=enabled", "--overwrite")
    until("all captured", enrolled)
    for node in NODES:
        expect(traces(node), f"{node}: nothing is found of a mesh that runs")
    helm("uninstall", "sockmesh", "--namespace", SYSTEM, "--timeout", "3m")
    helm("uninstall", "sockmesh-crds", "--namespace", SYSTEM)
    kubectl("delete", "crd", "meshnodes.sockmesh.io")
    nothing_left()


def nothing_left():
    """Nothing on the nodes, nothing in the way of traffic, nothing in the cluster."""
    for node in NODES:
        expect(not traces(node), f"{node}: {traces(node)}")
    for namespace_, pod in [("outside", "stranger"), ("shop", client_on("node1"))]:
        until("an answer", lambda: "pod=web" in curl(pod, "http://web.shop/", namespace=namespace_, fails=True))
    kinds = "all,configmaps,secrets,leases,roles,rolebindings,serviceaccounts,networkpolicies"
    left = [name for name in kubectl("get", "-n", SYSTEM, kinds, "-o", "name").split()
            if not re.match("configmap/kube-root-ca.crt|serviceaccount/default|pod/sockmesh-cleanup-", name)]
    left += re.findall(".*sockmesh.*", kubectl("get", "clusterroles,clusterrolebindings,customresourcedefinitions", "-o", "name"))
    expect(not left, f"left: {left}")


def new_pods(story):
    "and new pods come up as before"
    kubectl("rollout", "restart", "-n", "shop", "deployment/web")
    kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=90s")
    until("an answer", lambda: "pod=web" in stranger("http://web.shop/"))
