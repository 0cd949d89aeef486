"""What the steps drive the cluster with: its commands, waits, load, and a look at the wire."""

import json
import os
import pathlib
import re
import secrets
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[1]
REPOSITORY = HERE.parents[1]
NAME = os.environ.get("SOCKMESH_CLUSTER", "cluster")
SYSTEM = "sockmesh-system"
AGENTS, CONTROLLERS = "app.kubernetes.io/name=sockmesh-node", "app.kubernetes.io/name=sockmesh-controller"


def settings():
    """What the cluster was started with."""
    try:
        text = pathlib.Path(f"/var/lib/sockmesh-{NAME}/settings").read_text()
    except FileNotFoundError:
        raise SystemExit(f"error: the cluster {NAME} does not run: e2e/cluster/up starts it") from None
    return dict(word.split("=", 1) for word in text.split())


NODES = [f"node{n + 1}" for n in range(int(settings()["NODE_COUNT"]))]
DUAL_STACK = bool(settings()["DUAL_STACK"])
# In the path of every request between pods of the mesh; on no wire between nodes.
CANARY = "canary-" + secrets.token_hex(8)
BEGAN = time.monotonic()


class Failed(Exception):
    """A step did not find what it wanted."""


def say(text):
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


def run(*command, fails=False, timeout=300, stdin=None):
    """The command's output. Unless `fails`, its failure is this step's."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, input=stdin)
    if done.returncode != 0 and not fails:
        raise Failed(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr if fails else done.stdout


def kubectl(*arguments, **options):
    return run(HERE / "bin/kubectl", *arguments, **options)


def helm(*arguments, **options):
    return run(HERE / "bin/helm", *arguments, **options)


def sockmesh(*arguments, **options):
    """The command line, as its user runs it."""
    return run(HERE / "bin/sockmesh", *arguments, **options)


def on(machine, *command, **options):
    return run(HERE / "on", machine, *command, **options)


def get(*arguments):
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def until(what, look, seconds=60):
    """Waits until `look` gives something true, and returns that."""
    end = time.monotonic() + seconds
    while True:
        seen = error = None
        try:
            seen = look()
        # A pod that is only just being made has no node and no address.
        except (Failed, subprocess.TimeoutExpired, LookupError, StopIteration) as failure:
            error = f"{type(failure).__name__}: {failure}"
        if seen:
            return seen
        if time.monotonic() > end:
            raise Failed(f"not within {seconds} s: {what}" + (f"; at last: {error}" if error else ""))
        time.sleep(0.2)


def expect(condition, text):
    if not condition:
        raise Failed(text)


def pods(selector, namespace="shop"):
    """The pods that are not going, by node."""
    found = get("pods", "-n", namespace, "-l", selector)["items"]
    return sorted((p for p in found if "deletionTimestamp" not in p["metadata"]), key=lambda p: p["spec"].get("nodeName", ""))


def web_on(node):
    return next(p for p in pods("app=web") if p["spec"]["nodeName"] == node)


def each_address(addresses):
    """Addresses as they stand in a URL."""
    return [f"[{address}]" if ":" in address else address for address in addresses]


def addresses_of(pod):
    """A pod's addresses of both families, as they stand in a URL."""
    return each_address(ip["ip"] for ip in pod["status"]["podIPs"])


def settle_web(count):
    """Waits until there are so many pods of the application and no others."""
    until(f"{count} pods", lambda: len(get("pods", "-n", "shop", "-l", "app=web")["items"]) == count)


def client_on(node):
    return next(p for p in pods("app=client") if p["spec"]["nodeName"] == node)["metadata"]["name"]


def curl(pod, url, *arguments, namespace="shop", **options):
    return kubectl("exec", "-n", namespace, pod, "--", "curl", "-sS", "-m", "5", *arguments, url, **options)


def stranger(url, *arguments):
    """What somebody outside of the mesh gets; no canary, for that one may be seen."""
    return curl("stranger", url, *arguments, namespace="outside", fails=True)


def from_outside(url):
    """What somebody gets who is not in the cluster at all; no canary either."""
    return run("nsenter", f"--net=/run/netns/{NAME}-fabric", "curl", "-sS", "-m", "5", url, fails=True)


def entries():
    """Every way into the application through a node: its NodePort on all of them, and the hostPort of `entry` on its own."""
    nodes = [f"10.99.0.{10 + number}" for number in range(1, len(NODES) + 1)]
    return [f"http://{node}:30081/" for node in nodes] + [f"http://{nodes[0]}:30880/"]


def ask(pod, host, *arguments, **options):
    return curl(pod, f"http://{host}/{CANARY}", *arguments, **options)


def metrics(node):
    """Every sample: name, labels, value."""
    samples = []
    for line in on(node, "curl", "-sf", "http://127.0.0.1:15020/metrics").splitlines():
        found = re.fullmatch(r'([a-z_0-9]+)(?:\{(.*)\})? (\S+)(?: .*)?', line)
        if found and not line.startswith("#"):
            labels = dict(re.findall(r'([a-z_0-9]+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
            samples.append((found[1], labels, float(found[3])))
    return samples


def total(name, nodes=NODES, **wanted):
    """Sum of a metric over nodes and over all samples with these labels."""
    return sum(
        value for node in nodes for metric, labels, value in metrics(node)
        if metric == name and all(labels.get(k) == v for k, v in wanted.items()))


def status(node):
    return json.loads(on(node, "curl", "-sf", "http://127.0.0.1:15020/debug/config"))


def controller_page(path):
    """A page of one of the controllers' admin servers."""
    address = each_address([pods(CONTROLLERS, SYSTEM)[0]["status"]["podIP"]])[0]
    return on("node1", "curl", "-sf", f"http://{address}:15014{path}")


def captured(node):
    """UIDs of the pods of a node that are in the mesh."""
    return {pod["uid"] for pod in status(node)["status"]["pods"] if pod["captured"]}


def outcomes(failed):
    """Failed requests by how they failed, as a text."""
    kinds = {}
    for line in failed:
        kind = re.sub(r" after \d+ ms", "", line)
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind.strip()!r}" for kind, count in sorted(kinds.items(), key=lambda k: -k[1]))


def enrolled(namespace="shop"):
    """Whether every running pod of the namespace is in the mesh."""
    running = {}
    for pod in get("pods", "-n", namespace)["items"]:
        if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]:
            running.setdefault(pod["spec"]["nodeName"], set()).add(pod["metadata"]["uid"])
    return all(uids <= captured(node) for node, uids in running.items())


def probes_of(node):
    """How often the kubelet's probes succeeded and how often they did not: by pod, kind and result."""
    counted = {}
    for line in kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/metrics/probes").splitlines():
        labels = dict(re.findall(r'([a-z_]+)="([^"]*)"', line))
        if line.startswith("prober_probe_total{") and labels["namespace"] == "shop":
            key = labels["pod"], labels["probe_type"], labels["result"]
            counted[key] = counted.get(key, 0) + float(line.split()[-1])
    return counted


class Load:
    """One request after the other from a pod of each node, until `stop`."""

    def __init__(self):
        self.pods = [client_on(node) for node in NODES]
        loop = (f"rm -f /tmp/stop /tmp/load; while [ ! -e /tmp/stop ]; do "
                f"curl -s -m 10 -o /dev/null -w '%{{http_code}} %header{{x-sockmesh-reason}} %{{errormsg}}\\n' http://web/{CANARY} "
                f">>/tmp/load 2>&1; usleep 20000; done; touch /tmp/stopped")
        for pod in self.pods:
            kubectl("exec", "-n", "shop", pod, "--", "sh", "-c", f"rm -f /tmp/stopped; ({loop}) </dev/null >/dev/null 2>&1 &")
        until("requests on their way", lambda: all(self.lines(p) for p in self.pods))

    @staticmethod
    def lines(pod):
        return kubectl("exec", "-n", "shop", pod, "--", "cat", "/tmp/load").splitlines()

    def stop(self):
        """Number of requests, and lines of those that failed."""
        sent, failed = 0, []
        for pod in self.pods:
            kubectl("exec", "-n", "shop", pod, "--", "touch", "/tmp/stop")
            until("the end of the load", lambda: not kubectl("exec", "-n", "shop", pod, "--", "ls", "/tmp/stopped", fails=True).startswith("ls:"))
            lines = self.lines(pod)
            sent += len(lines)
            failed += [line for line in lines if not line.startswith("200 ")]
        expect(sent > 20, f"only {sent} requests were sent")
        return sent, failed

    def unfailing(self):
        """Stops, and says how many requests were sent, none of which may have failed."""
        sent, failed = self.stop()
        expect(not failed, f"{len(failed)} of {sent} requests failed: {outcomes(failed)}")
        return sent


class Capture:
    """Records what passes between the machines."""

    def __init__(self, what="tcp"):
        self.file = pathlib.Path(tempfile.mkdtemp()) / "wire.pcap"
        self.process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{NAME}-fabric", "tcpdump", "-i", "any", "--immediate-mode", "-U", "-s", "0", "-w", str(self.file), what],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until("the capture", lambda: self.file.exists() and self.file.stat().st_size)

    def end(self):
        self.process.terminate()
        self.process.wait()

    def packets(self, which):
        """Those that match, a line each, once it has ended."""
        return run("tcpdump", "-nn", "-r", self.file, which).splitlines()

    def stop(self):
        """The recorded bytes."""
        self.end()
        bytes_ = self.file.read_bytes()
        self.file.unlink()
        self.file.parent.rmdir()
        return bytes_


def traces(node):
    """All that the mesh may have left on a node."""
    return on(node, "bash", "-c", """
        ls -d /run/sockmesh /var/lib/sockmesh /sys/fs/bpf/sockmesh /opt/cni/bin/sockmesh* 2>/dev/null
        grep -rl sockmesh /etc/cni/net.d 2>/dev/null
        pgrep -a sockmesh
        ip -brief link | grep ^sockmesh
        for family in -4 -6; do
            ip $family rule | grep ^1587[0-9]:
            ip $family route show table 15871 2>/dev/null
        done
        true""").strip()
