"""The command line as people use it: what it shows is what is, and what it does is done."""

import json
import re
import time

from .driving import (
    ask, captured, client_on, enrolled, expect, get, kubectl, NODES, REPOSITORY, run, sockmesh, status, stranger, SYSTEM,
    total, traces, until, web_on,
)
from .joining import nothing_left
from .wireguard import connected

WEB, CLIENT = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/client"


def rows(text, key):
    """The lines of a table, as values by heading, by the value below one heading."""
    def cells(line):
        return re.split(r"\s{2,}", line.strip())
    heading, *lines = text.strip().splitlines()
    found = [dict(zip(cells(heading), cells(line))) for line in lines]
    return {row[key]: row for row in found}


def completions(story):
    "what sockmesh completions prints makes a shell complete commands and options"
    script = sockmesh("completions", "bash")
    for words, wanted in [(["pr"], {"proxy"}), (["ca", "ro"], {"rotate"}), (["proxy", "c"], {"config", "certs", "connections"}),
                          (["status", "--wa"], {"--wait"}), (["completions", "z"], {"zsh"})]:
        before = words[-2] if len(words) > 1 else "sockmesh"
        asked = (f"source /dev/stdin; complete -p sockmesh >/dev/null || exit 1; COMP_WORDS=(sockmesh {' '.join(words)}) "
                 f"COMP_CWORD={len(words)}; _sockmesh sockmesh {words[-1]} {before}; echo \"${{COMPREPLY[@]}}\"")
        given = run("bash", "--norc", "-c", asked, stdin=script).split()
        expect(set(given) == wanted, f"{' '.join(words)} is completed to {given}")
    for shell in ["zsh", "fish"]:
        expect("rotate" in sockmesh("completions", shell), f"nothing for {shell}")


def proxy(story):
    "sockmesh proxy shows a node's processes, pods, services, certificates, and who talked with whom"
    client, web = client_on("node1"), web_on("node2")
    client_row, web_name = f"shop/{client}", web["metadata"]["name"]

    told = sockmesh("proxy", "config", "node1")
    expect(re.match(r"node +node1 \(version [^)]+\): ready\n", told), f"config: {told}")
    for process in ["worker", "keyd"]:
        pid = status("node1")["status"][f"{process}_pid"]
        expect(re.search(rf"^{process} +{pid} \(", told, re.M), f"config: {process} is {pid}, and told is\n{told}")
    row = rows(told.split("\n\n")[1], "POD")[client_row]
    expect((row["STATE"], row["MODE"], row["IDENTITY"]) == ("captured", "fail-closed", CLIENT), f"config: {row}")
    document = json.loads(sockmesh("proxy", "config", "node1", "-o", "json"))
    expect({pod["uid"] for pod in document["status"]["pods"] if pod["captured"]} == captured("node1"), "config -o json: other pods")

    known = rows(sockmesh("proxy", "workloads", "node1"), "POD")
    row = known[web_name]
    seen = row["NAMESPACE"], row["NODE"], row["ADDRESS"].split(",")[0], row["ACCOUNT"], row["MESH"], row["MTLS"]
    expect(seen == ("shop", "node2", web["status"]["podIP"], "web", "in", "strict"), f"workloads: {row}")
    expect(known["stranger"]["MESH"] == "out", f"workloads: {known['stranger']}")

    known = rows(sockmesh("proxy", "services", "node1"), "SERVICE")
    addresses = ",".join(get("service", "-n", "shop", "web")["spec"]["clusterIPs"])
    endpoints = sum(len(part["endpoints"]) for part in get("endpointslices", "-n", "shop", "-l", "kubernetes.io/service-name=web")["items"])
    row = known["web"]
    seen = row["NAMESPACE"], row["ADDRESS"], row["PORTS"].split("/")[0], row["READY"], row["IN MESH"]
    expect(seen == ("shop", addresses, "80", *[f"{endpoints}/{endpoints}"] * 2), f"services: {row}")
    expect(known["web-each"]["ADDRESS"] == "headless", f"services: {known['web-each']}")

    known = rows(sockmesh("proxy", "certs", "node1"), "POD")
    expect(len(known) == len(captured("node1")), f"certs: {len(known)}, and {len(captured('node1'))} pods are captured")
    row = known[client_row]
    expect(row["IDENTITY"] == CLIENT and re.search(r"\(in 2[0-9] h", row["VALID UNTIL"]) and row["ERROR"] == "-", f"certs: {row}")

    def between():
        found = [c for c in json.loads(sockmesh("proxy", "connections", "node1", "-o", "json"))
                 if (c["source"], c["destination"], c["side"], c["security"]) == ("shop/client", "shop/web", "source", "mutual_tls")]
        return (found[0]["requests"], found[0]["failed"]) if found else (0, 0)
    before = between()
    for _ in range(5):
        ask(client, "web")
    wanted = before[0] + 5, before[1]
    until(f"connections: {wanted} requests and failures", lambda: between() == wanted, 10)
    expect("shop/client" in sockmesh("proxy", "connections", "node1"), "connections: not in the table")

    refused = sockmesh("proxy", "config", "node99", fails=True)
    expect("there is no node node99" in refused and "node1" in refused, f"of a node that is not there it says: {refused}")
    return f"{len(known)} pods"


def by_command(story):
    "sockmesh install (with the tunnel), status --wait and uninstall --crds: no helm command is needed, and nothing is left either"
    sockmesh("install", "--chart", REPOSITORY / "charts/sockmesh", "--values", REPOSITORY / "charts/test/cluster.yaml",
             "--set", "wireguard.enabled=true")
    began = time.monotonic()
    sockmesh("status", "--wait", "--timeout", "120s")
    took = time.monotonic() - began
    told = json.loads(sockmesh("status", "-o", "json"))
    nodes = {node["name"]: node["ready"] and node["connected"] for node in told["nodes"]}
    expect(told["ready"] and nodes == dict.fromkeys(NODES, True), f"status: {told}")
    kubectl("get", "crd", "meshnodes.sockmesh.io")
    # `uninstall` left the label, as people may.
    kubectl("label", "namespace", "shop", "sockmesh.io/mesh=enabled", "--overwrite")
    until("all captured", enrolled)
    until("an answer", lambda: "pod=web" in ask(client_on("node1"), "web", fails=True))
    until("a refusal", lambda: "pod=web" not in stranger("http://web.shop/"))
    expect(total("istio_requests_total", reporter="destination", destination_principal=WEB, source_principal=CLIENT) > 0,
           "no request with both principals")
    until("every node has a tunnel to every other one", connected)
    for node in NODES:
        expect("sockmesh_wg" in traces(node), f"{node}: no interface of a tunnel that runs is found")
    told = sockmesh("uninstall", "--crds", "--", "--timeout", "3m", fails=True)
    expect("still opted in: shop" in told and "meshnodes.sockmesh.io is removed" in told, f"sockmesh uninstall says: {told}")
    nothing_left()
    expect("there is no mesh in the namespace" in sockmesh("status", fails=True), "sockmesh status sees a mesh")
    return f"ready {took:.0f} s after the install"
