"""What changes and what fails under load."""

import json
import os
import subprocess
import time

from .driving import (
    ask, CANARY, client_on, CONTROLLERS, enrolled, expect, Failed, get, HERE, kubectl, Load, NODES, on,
    pods, run, settle_web, sockmesh, stranger, SYSTEM, until, web_on,
)


RACE = int(os.environ.get("RACE", "40"))
AWAY = int(os.environ.get("AWAY", "20"))


def rollout(story):
    "a rollout restart of the application under load: no request fails"
    load = Load()
    kubectl("rollout", "restart", "-n", "shop", "deployment/web")
    kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=120s")
    time.sleep(4)  # The last old pods' preStop.
    sent = load.unfailing()
    return f"{sent} requests"


def scale(story):
    "scaling up and down under load: no request fails"
    load = Load()
    kubectl("scale", "-n", "shop", "deployment/web", f"--replicas={3 * len(NODES)}")
    kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=120s")
    until("the new ones captured", enrolled)
    kubectl("scale", "-n", "shop", "deployment/web", f"--replicas={len(NODES)}")
    settle_web(len(NODES))
    sent = load.unfailing()
    return f"{sent} requests"


def agents(story):
    "a rolling restart of the nodes' proxies under load: no request fails"
    load = Load()
    kubectl("rollout", "restart", "-n", SYSTEM, "daemonset/sockmesh-node")
    kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=120s")
    until("all captured", enrolled)
    sent = load.unfailing()
    return f"{sent} requests"


def race(story):
    "new pods that connect in their first instruction: none in plain"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "race", "namespace": "shop"}, "spec": {
        "completions": RACE, "parallelism": min(RACE, 20), "backoffLimit": 0, "template": {"metadata": {"labels": {"app": "race"}}, "spec": {
            "serviceAccountName": "client", "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "enableServiceLinks": False,
            "containers": [{"name": "race", "image": "localhost/apps:1", "command": [
                "curl", "-sS", "-f", "-m", "20", f"http://web/{CANARY}"]}]}}}}
    try:
        kubectl("apply", "-f", "-", stdin=json.dumps(job))

        def ended():
            status_ = get("job", "-n", "shop", "race")["status"]
            return status_ if status_.get("succeeded", 0) + status_.get("failed", 0) >= RACE or status_.get("failed") else None
        ended_ = until("the end of all pods", ended, 60 + 4 * RACE)
        if ended_.get("failed"):
            bad = next(p for p in get("pods", "-n", "shop", "-l", "app=race")["items"] if p["status"]["phase"] == "Failed")
            raise Failed(f"{ended_}: {kubectl('logs', '-n', 'shop', bad['metadata']['name'], fails=True)}")
        return f"{RACE} pods"
    finally:
        kubectl("delete", "job", "-n", "shop", "race", "--ignore-not-found", "--wait=false", "--cascade=foreground")


def controller(story):
    "without a controller traffic goes on, and new pods wait instead of running in plain"
    kubectl("scale", "-n", SYSTEM, "deployment/sockmesh-controller", "--replicas=0")
    until("no controller", lambda: not pods(CONTROLLERS, SYSTEM))
    began = time.monotonic()
    load = Load()
    try:
        kubectl("scale", "-n", "shop", "deployment/web", f"--replicas={2 * len(NODES)}")
        while time.monotonic() - began < AWAY:
            time.sleep(1)
        ready = get("deployment", "-n", "shop", "web")["status"].get("readyReplicas")
        expect(ready == len(NODES), f"{ready} pods run, {len(NODES)} of them were enrolled before")
    finally:
        kubectl("scale", "-n", SYSTEM, "deployment/sockmesh-controller", "--replicas=2")
    back = time.monotonic()
    kubectl("rollout", "status", "-n", SYSTEM, "deployment/sockmesh-controller", "--timeout=120s")
    kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=180s")
    waited = time.monotonic() - back
    until("the new ones captured", enrolled)
    kubectl("scale", "-n", "shop", "deployment/web", f"--replicas={len(NODES)}")
    settle_web(len(NODES))
    sent = load.unfailing()
    return f"{AWAY} s, {sent} requests; the new pods ran {waited:.0f} s after its return"


def api_server(story):
    "the API server restarts under load: no request fails"
    load = Load()
    on("cp", "pkill", "-KILL", "-x", "kube-apiserver")
    until("the API server", lambda: kubectl("get", "--raw", "/readyz") == "ok", 90)
    until("both controllers ready", lambda: get("deployment", "-n", SYSTEM, "sockmesh-controller")["status"].get("readyReplicas") == 2, 90)
    sent = load.unfailing()
    return f"{sent} requests"


def rotation(story):
    "sockmesh ca rotate replaces the root under load, to the end, and pods with certificates of both roots talk: no request fails"
    def ca():
        return json.loads(sockmesh("ca", "status", "-o", "json"))

    def phase():
        told = ca()["rotation"] or {}
        return told.get("phase") if told.get("id") == asked else None
    before = ca()
    expect(before["mode"] == "self-signed" and len(before["roots"]) == 1, f"the CA: {before}")
    load = Load()
    began = time.monotonic()
    rotate = subprocess.Popen([HERE / "bin/sockmesh", "ca", "rotate", "--wait"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        first = rotate.stdout.readline()
        expect("asked for a new root (id " in first, f"sockmesh ca rotate says: {first}")
        asked = first.strip().split("(id ")[1].rstrip(")")
        until("the controller begins", phase)
        refused = sockmesh("ca", "rotate", fails=True)
        expect("a rotation is under way" in refused, f"a second one is not refused: {refused}")
        until("the new root signs", lambda: phase() in ["switched", "done"], 90)
        kubectl("rollout", "restart", "-n", "shop", "deployment/web")
        kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=120s")
        # Nobody waits for the certificates' end: nodes replace them as soon as they hear of the new root.
        until("the last root is gone", lambda: phase() == "done", 120)
        took = time.monotonic() - began
        said = rotate.communicate(timeout=30)[0]
    finally:
        # It only watches.
        rotate.kill()
    expect(rotate.returncode == 0 and "done" in said, f"sockmesh ca rotate --wait ends with {rotate.returncode}: {said}")
    after = ca()
    expect(len(after["roots"]) == 1 and after["roots"][0]["sha256"] != before["roots"][0]["sha256"], f"the roots: {after['roots']}")
    expect(after["roots"][0]["sha256"] in sockmesh("ca", "status"), "the root is not in the table")
    sent = load.unfailing()
    return f"{sent} requests, {took:.0f} s"


def crash(story):
    "a node loses power and comes back: its pods are in the mesh again before anybody reaches them"
    run(HERE / "crash", "node2")
    run(HERE / "up")
    kubectl("rollout", "status", "-n", SYSTEM, "daemonset/sockmesh-node", "--timeout=120s")

    # A node that was told by a controller there has yet to hear of the pod's new address, and must not take it for anybody's.
    def answered():
        return all("pod=web" in ask(client_on(node), f"{web_on('node2')['status']['podIP']}:8080") for node in NODES)
    until("answers of node2's pod", answered, 120)
    until("all captured", enrolled)
    for _ in range(10):
        expect("pod=" not in stranger("http://web.shop/"), "one outside of the mesh was answered")


def flapping(story):
    "a label that comes and goes: in the end all are in, and nothing restarted"
    for _ in range(5):
        kubectl("label", "namespace", "shop", "sockmesh.io/mesh-")
        kubectl("label", "namespace", "shop", "sockmesh.io/mesh=enabled")
    until("all captured", enrolled)
    until("a refusal", lambda: "pod=web" not in stranger("http://web.shop/"))
    expect("pod=web" in ask(client_on("node1"), "web"), "no answer")
