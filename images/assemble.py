#!/usr/bin/env python3
"""assemble.py CONTEXT NAME:TAG OUT.tar [DOCKERFILE]

Builds the image of a Dockerfile without a container engine, as an OCI archive that `ctr images import`, `podman load`
and `docker load` (25 and newer) take. DOCKERFILE is CONTEXT/Dockerfile unless named.

It runs nothing, so it knows only what an image put together from ready files needs: FROM scratch, COPY, ENTRYPOINT,
CMD, ENV, USER, WORKDIR, EXPOSE, LABEL. Anything else is refused rather than left out. The result depends on the
Dockerfile and the bytes and modes of the files alone (no dates, all owned by root), so an unchanged image keeps its
digest.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import shlex
import sys
import tarfile

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Refused(Exception):
    """The Dockerfile asks for what cannot be done here; says where and what."""


def instructions(path):
    """The Dockerfile's instructions, as (line number, name, rest of the line)."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    at = 0
    while at < len(lines):
        first, text = at + 1, lines[at].strip()
        at += 1
        if not text or text.startswith("#"):
            continue
        while text.endswith("\\") and at < len(lines):
            text = text[:-1] + " " + lines[at].strip()
            at += 1
        name, _, rest = text.partition(" ")
        yield first, name.upper(), rest.strip()


class Layer:
    """One tar file, each folder and file once, in the order in which they were added."""

    def __init__(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)
        self.folders = set()

    def folder(self, path, mode=0o755):
        path = path.strip("/")
        if not path or path in self.folders:
            return
        self.folder(os.path.dirname(path))
        self.folders.add(path)
        info = tarfile.TarInfo(path)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(info)

    def copy(self, source, path):
        """Adds a file, a symbolic link, or a folder with all that is in it."""
        mode = os.lstat(source).st_mode & 0o7777
        if os.path.isdir(source) and not os.path.islink(source):
            self.folder(path, mode)
            for name in sorted(os.listdir(source)):
                self.copy(os.path.join(source, name), f"{path.rstrip('/')}/{name}")
            return
        self.folder(os.path.dirname(path))
        info = tarfile.TarInfo(path.lstrip("/"))
        info.mode = mode
        if os.path.islink(source):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(source)
            self.tar.addfile(info)
        elif os.path.isfile(source):
            info.size = os.path.getsize(source)
            with open(source, "rb") as file:
                self.tar.addfile(info, file)
        else:
            raise Refused(f"{source} is neither a file, a folder nor a symbolic link")

    def bytes(self):
        self.tar.close()
        return self.buffer.getvalue()


def copy(layer, context, workdir, rest):
    """COPY SOURCE... DESTINATION, with Docker's rules for what DESTINATION means."""
    words = shlex.split(rest)
    if len(words) < 2 or any(word.startswith("--") for word in words):
        raise Refused("COPY is known as COPY SOURCE... DESTINATION, without options")
    *sources, destination = words
    target = os.path.normpath(os.path.join(workdir, destination))
    into = destination.endswith("/") or destination == "." or len(sources) > 1
    for source in sources:
        path = os.path.normpath(os.path.join(context, source.lstrip("/")))
        if not os.path.lexists(path):
            raise Refused(f"COPY {source}: there is no {path}; was the context prepared?")
        if os.path.isdir(path) and not os.path.islink(path):
            for name in sorted(os.listdir(path)):  # a folder's content is copied, not the folder
                layer.copy(os.path.join(path, name), f"{target.rstrip('/')}/{name}")
        else:
            layer.copy(path, os.path.join(target, os.path.basename(path)) if into else target)


def words_or_shell(rest):
    if not rest.startswith("["):
        raise Refused('only the form ["program", "argument"] is known: there may be no shell in the image')
    return json.loads(rest)


def read(dockerfile, context):
    """The layer and the configuration that a Dockerfile describes."""
    layer, config = Layer(), {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    workdir, begun = "/", False
    for line, name, rest in instructions(dockerfile):
        try:
            if name != "FROM" and not begun:
                raise Refused("the first instruction has to be FROM scratch")
            match name:
                case "FROM":
                    if rest != "scratch" or begun:
                        raise Refused("only one stage, FROM scratch, can be built here")
                    begun = True
                case "COPY":
                    copy(layer, context, workdir, rest)
                case "ENTRYPOINT":
                    config["Entrypoint"] = words_or_shell(rest)
                case "CMD":
                    config["Cmd"] = words_or_shell(rest)
                case "ENV":
                    for setting in shlex.split(rest):
                        key = setting.partition("=")[0]
                        config["Env"] = [e for e in config["Env"] if not e.startswith(f"{key}=")] + [setting]
                case "USER":
                    config["User"] = rest
                case "WORKDIR":
                    workdir = os.path.normpath(os.path.join(workdir, rest))
                    layer.folder(workdir)
                case "EXPOSE":
                    ports = {p if "/" in p else f"{p}/tcp": {} for p in rest.split()}
                    config.setdefault("ExposedPorts", {}).update(ports)
                case "LABEL":
                    labels = dict(setting.split("=", 1) for setting in shlex.split(rest))
                    config.setdefault("Labels", {}).update(labels)
                case _:
                    raise Refused(f"{name} is not known here; build this image with docker or podman")
        except (Refused, ValueError) as refused:
            raise Refused(f"{dockerfile}:{line}: {refused}") from refused
    config["WorkingDir"] = workdir
    return layer.bytes(), config


def write(out, name, layer, config):
    """The archive: blobs named after their digests, and an index that says how they hang together."""
    blobs = {}

    def blob(kind, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    target = {"architecture": ARCHITECTURES[platform.machine()], "os": "linux"}
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}
    compressed = gzip.compress(layer, compresslevel=1, mtime=0)
    manifest = blob(
        "manifest.v1+json",
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob("config.v1+json", json.dumps(target | {"config": config, "rootfs": rootfs}).encode()),
                "layers": [blob("layer.v1.tar+gzip", compressed)],
            }
        ).encode(),
    )
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest | {"platform": target, "annotations": names}],
    }
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    with tarfile.open(out + ".new", "w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.rename(out + ".new", out)


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    context, name, out = sys.argv[1:4]
    dockerfile = sys.argv[4] if len(sys.argv) == 5 else os.path.join(context, "Dockerfile")
    try:
        write(out, name, *read(dockerfile, context))
    except (Refused, OSError) as error:
        sys.exit(f"error: image {name}: {error}")


if __name__ == "__main__":
    main()
