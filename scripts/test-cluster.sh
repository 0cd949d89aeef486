#!/usr/bin/env bash
# Plays the mesh's story on a real Kubernetes, from nothing but this repository: starts a cluster, plays, and takes the
# cluster down again, unless it ran before or is to be kept. Binaries and images are built by then (make test-cluster).
#   test-cluster.sh [--fast] [STEP...]    arguments of e2e/cluster/test
#
#   ARGS="--nodes 3 --dual-stack"   what kind of cluster
#   KEEP=1                          it goes on running
#   RACE=500 AWAY=600               two steps as long as they are meant to be before a release
#
# The exit status is 3 where this computer cannot have a cluster, or its programs cannot be built; then the last line says why.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${SOCKMESH_CLUSTER:-cluster}
as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo "--preserve-env=SOCKMESH_CLUSTER,CARGO_TARGET_DIR,RACE,AWAY")
fi

unfit() { printf 'this computer cannot have a cluster: %s\n' "$*"; exit 3; }

scripts/install-deps.sh cluster
why=$(e2e/cluster/fit) || unfit "$why"
e2e/cluster/build-programs || unfit "its programs could not be built, see above"
images=(pause coredns apps)
if [[ " $* " != *" --fast "* ]]; then
    images+=(prometheus)
fi
e2e/cluster/build-images "${images[@]}"

finish() {
    if [ -z "${KEEP-}" ]; then
        e2e/cluster/down
    fi
}
if [ -e "/var/lib/sockmesh-$name/settings" ]; then
    printf 'the cluster %s runs already, and is left running\n' "$name"
else
    trap finish EXIT
fi
read -ra kind <<<"${ARGS-}"
if ! e2e/cluster/up "${kind[@]}" >/dev/null; then
    echo "the cluster did not come up; once more, from nothing"
    e2e/cluster/down
    e2e/cluster/up "${kind[@]}" >/dev/null
fi
if [ $# = 0 ]; then
    # What Helm renders, by this API server's own rules; then the chart's life on it.
    "${as_root[@]}" env "PATH=$PWD/e2e/cluster/bin:$PATH" charts/test/run --server
    "${as_root[@]}" charts/test/cluster
fi
"${as_root[@]}" e2e/cluster/test "$@"
