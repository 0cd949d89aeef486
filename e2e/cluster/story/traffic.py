"""What works in the mesh, what is refused, and what is seen of it."""

import json
import re
import subprocess

from .driving import (
    addresses_of, ask, CANARY, client_on, DUAL_STACK, each_address, entries, expect, from_outside, get, HERE, kubectl, Load,
    NODES, on, pods, probes_of, run, stranger, total, until, web_on,
)


def service(story):
    "a Service is answered from every node, and sees its clients' addresses"
    for node in NODES:
        pod = client_on(node)
        own = next(p for p in pods("app=client") if p["metadata"]["name"] == pod)["status"]["podIPs"]
        answers = [ask(pod, "web") for _ in range(6 * len(NODES))]
        expect({f"node={n}" for n in NODES} <= set(" ".join(answers).split()), f"{node}: {answers}")
        sources = {re.search("from=([^ ]+)", answer)[1] for answer in answers}
        expect(sources <= {ip["ip"] for ip in own}, f"{node}: sources {sources} instead of {own}")


def addresses(story):
    "a headless Service, each address of a Service and of pods, and a full name, between nodes and on one"
    virtual = each_address(get("service", "-n", "shop", "web")["spec"]["clusterIPs"])
    expect(len(virtual) == (2 if DUAL_STACK else 1), f"the Service's addresses: {virtual}")
    direct = [f"{address}:8080" for node in NODES for address in addresses_of(web_on(node))]
    for node in NODES:
        for target in ["web-each:8080", "web.shop.svc.cluster.local", *virtual, *direct]:
            expect("pod=web" in ask(client_on(node), target), f"{node} to {target}")
    return f"{len(virtual + direct)} addresses"


def named_ports(story):
    "a Service whose port is a name finds the number that each pod gives it"
    numbers = {port["port"] for part in get("endpointslices", "-n", "shop", "-l", "kubernetes.io/service-name=pages")["items"]
               for port in part["ports"]}
    expect(numbers == {80, 8080}, f"the name stands for {numbers}")
    for node in NODES:
        answered = set()

        def both():
            answered.add(re.search("pod=([a-z]+)", ask(client_on(node), "pages"))[1])
            return answered == {"web", "entry"}
        until(f"answers of both kinds of pods, asked from {node}", both)


def identities(story):
    "istio_requests_total has both principals, on both sides, over mutual TLS"
    wanted = {"source_principal": "spiffe://cluster.local/ns/shop/sa/client", "response_code": "200",
              "destination_principal": "spiffe://cluster.local/ns/shop/sa/web", "connection_security_policy": "mutual_tls",
              "destination_service_name": "web"}
    for reporter in ["source", "destination"]:
        before = total("istio_requests_total", reporter=reporter, **wanted)
        names = each_address(get("service", "-n", "shop", "web")["spec"]["clusterIPs"]) + ["web"]
        sent = 0
        for node in NODES:
            for n in range(6):
                ask(client_on(node), names[n % len(names)])
                sent += 1

        def more():
            return total("istio_requests_total", reporter=reporter, **wanted) - before
        until(f"{sent} more at the {reporter}", lambda: more() >= sent)
        expect(more() == sent, f"{reporter}: {more()} instead of {sent}")
    plain = total("istio_requests_total", reporter="destination", connection_security_policy="none", destination_service_name="web",
                  source_workload="client")
    expect(plain == 0, f"{plain} requests of the mesh's clients came in plain")


def prometheus(story):
    "a Prometheus that scrapes what is annotated has every node, and Kiali's and Istio's queries return the traffic"
    targets = []
    for pod in get("pods", "--all-namespaces")["items"]:
        notes = pod["metadata"].get("annotations", {})
        if notes.get("prometheus.io/scrape") == "true":
            targets.append({"targets": [f"{pod['status']['podIP']}:{notes['prometheus.io/port']}"],
                            "labels": {"__metrics_path__": notes["prometheus.io/path"], "pod": pod["metadata"]["name"]}})
    manifest = (HERE / "manifests/prometheus.yaml").read_text().replace("@TARGETS@", json.dumps(targets))
    kubectl("apply", "-f", "-", stdin=manifest)
    kubectl("rollout", "status", "-n", "monitoring", "deployment/prometheus", "--timeout=60s")
    address = pods("app=prometheus", "monitoring")[0]["status"]["podIP"]

    def query(text):
        answer = json.loads(on("node1", "curl", "-sfG", f"http://{address}:9090/api/v1/query", "--data-urlencode", f"query={text}"))
        return [(sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]]
    wanted = {f"10.99.0.{10 + number}:15020" for number in range(1, len(NODES) + 1)}
    until("every node is scraped", lambda: wanted <= {m["instance"] for m, up in query("up") if up == 1})
    expect(all(up == 1 for _, up in query("up")), f"targets are down: {query('up')}")
    load = Load()
    try:
        # What Kiali asks for the edges of its graph of a namespace.
        labels = ("source_cluster,source_workload_namespace,source_workload,source_canonical_service,source_canonical_revision,"
                  "source_principal,destination_cluster,destination_service_namespace,destination_service,destination_service_name,"
                  "destination_workload_namespace,destination_workload,destination_canonical_service,destination_canonical_revision,"
                  "destination_principal,request_protocol,response_code,grpc_response_status,response_flags,connection_security_policy")
        for reporter in ["source", "destination"]:
            edges = until(f"an edge of the graph, by the {reporter}", lambda: query(
                f'sum(rate(istio_requests_total{{reporter="{reporter}",destination_service_namespace="shop",response_code="200"}}[10s])) by ({labels}) > 0'))
            for edge, _ in edges:
                ends = edge["source_workload"], edge["source_principal"], edge["destination_workload"], edge["destination_principal"]
                expect(ends == ("client", "spiffe://cluster.local/ns/shop/sa/client", "web", "spiffe://cluster.local/ns/shop/sa/web"), str(edge))
        # Istio's dashboards for services and workloads: rate, share of successes, latency.
        service = 'destination_service=~"web.shop.svc.cluster.local"'
        for text in [f'round(sum(irate(istio_requests_total{{reporter=~"source",{service}}}[10s])), 0.001)',
                     f'sum(irate(istio_requests_total{{reporter=~"destination",{service},response_code!~"5.*"}}[10s])) / '
                     f'sum(irate(istio_requests_total{{reporter=~"destination",{service}}}[10s]))',
                     f'histogram_quantile(0.50, sum(irate(istio_request_duration_milliseconds_bucket{{reporter=~"source",{service}}}[10s])) by (le))']:
            until(f"a value of {text}", lambda: [v for _, v in query(text) if v > 0])
    finally:
        load.stop()
        kubectl("delete", "namespace", "monitoring", "--wait=false")
    return f"{len(edges)} edges"


def strict(story):
    "a strict pod refuses one outside of the mesh, by Service, address, NodePort and hostPort, and who is not in the cluster"
    virtual = each_address(get("service", "-n", "shop", "web")["spec"]["clusterIPs"])
    direct = [f"{address}:8080" for node in ["node1", "node2"] for address in addresses_of(web_on(node))]
    for url in [f"http://{place}/" for place in ["web.shop", *virtual, *direct]] + entries():
        answer = stranger(url)
        expect("pod=" not in answer, f"{url} answered {answer!r}")
    for url in entries():
        answer = from_outside(url)
        expect("pod=" not in answer, f"{url} answered {answer!r}")
    expect(total("sockmesh_refused_total", reason="PLAIN") > 0, "not counted in sockmesh_refused_total")


def permissive(story):
    "with sockmesh.io/mtls=permissive it does not, also not through NodePort and hostPort; and is strict again without"
    kubectl("annotate", "namespace", "shop", "sockmesh.io/mtls=permissive")
    for url in ["http://web.shop/", *entries()]:
        until(f"an answer of {url}", lambda: "pod=" in stranger(url))
    for url in entries():
        until(f"an answer of {url} to who is not in the cluster", lambda: "pod=" in from_outside(url))
    kubectl("annotate", "namespace", "shop", "sockmesh.io/mtls-")
    until("a refusal", lambda: "pod=web" not in stranger("http://web.shop/"))


def probes(story):
    "the kubelet's probes (HTTP, TCP, gRPC, exec) go on passing on strict pods"
    probed = [(web_on("node1"), "Readiness"), (web_on("node1"), "Liveness"),
              (pods("app=entry")[0], "Readiness"), (pods("app=entry")[0], "Liveness")]
    before = probes_of("node1")

    def more(result, pod, kind):
        key = pod["metadata"]["name"], kind, result
        return probes_of("node1").get(key, 0) - before.get(key, 0)
    until("five more of each", lambda: all(more("successful", *which) >= 5 for which in probed))
    for pod, kind in probed:
        expect(not more("failed", pod, kind), f"{pod['metadata']['name']}: a probe for {kind} failed")


def tools(story):
    "kubectl exec, logs and port-forward"
    pod = web_on("node2")["metadata"]["name"]
    expect(kubectl("exec", "-n", "shop", pod, "--", "hostname").strip() == pod, "exec")
    expect(CANARY in kubectl("logs", "-n", "shop", pod), "logs")
    forward = subprocess.Popen([HERE / "bin/kubectl", "port-forward", "-n", "shop", pod, "18080:8080"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until("an answer", lambda: f"pod={pod}" in run(HERE / "with-cluster", "curl", "-sm2", "http://127.0.0.1:18080/"), 20)
    finally:
        forward.terminate()
        forward.wait()


def wire_is_dark(story):
    "no canary on the wire between the nodes"
    expect(story.wire, "nothing was recorded")
    recorded = story.wire.stop()
    story.wire = None
    expect(len(recorded) > 20_000, f"only {len(recorded)} bytes were recorded")
    found = recorded.find(CANARY.encode())
    expect(found < 0, f"a request went in plain: {recorded[max(found - 150, 0):found + 150]!r}")
    return f"{len(recorded) // 1_000_000} MB recorded"
