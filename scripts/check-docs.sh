#!/usr/bin/env bash
# What the documentation says and the code knows better: reason flags, annotations, metrics, branches, values of the chart,
# settings of the node, and links between files. Each has one place in the code; here the documents are held against it.
set -euo pipefail
cd "$(dirname "$0")/.."

failures=0
bad() { failures=$((failures + 1)); printf '%s\n' "$*"; }
documents=(README.md docs/*.md)

# words PATTERN: every match in the documents, once.
words() { grep -ohE -- "$1" "${documents[@]}" charts/sockmesh/templates/NOTES.txt | sort -u; }

# Flags and meanings, in the order of reason.rs.
source=node-proxy/src/worker/reason.rs
in_code=$(sed -n 's/^ *[A-Za-z]* = [0-9]*, "\([A-Z]*\)", "\(.*\)";$/| `\1` | \2 |/p' "$source")
in_table=$(sed -n 's/^\(| `[A-Z]*` | [^|]* |\) [^|]* |$/\1/p' docs/troubleshooting.md)
if [ -z "$in_code" ]; then
    bad "$source: no reason is recognised here; has its form changed?"
elif [ "$in_code" != "$in_table" ]; then
    bad "docs/troubleshooting.md: the table of reason flags (<) is not that of $source (>)"
    diff <(echo "$in_table") <(echo "$in_code") | grep '^[<>]' || true
fi

# Annotations and the label: each one that is written about exists, and each for applications is written about.
known=$(grep -rohE '"sockmesh\.io/[a-z-]+"' mesh-controller/src | tr -d '"' | sort -u)
while read -r name; do
    grep -qxF -- "$name" <<<"$known" || bad "$name is written about; mesh-controller does not know it"
done < <(words 'sockmesh\.io/[a-z-]+' | grep -v -- '-$')
while read -r name; do
    grep -qF -- "$name" docs/opt-in.md || bad "docs/opt-in.md does not tell of $name"
done < <(grep -ohE '"sockmesh\.io/[a-z-]+"' mesh-controller/src/index/settings.rs | tr -d '"' | sort -u)

# Metrics. The controller's are registered without prefix and without the suffix that the format adds.
while read -r name; do
    short=${name#sockmesh_controller_} short=${short%_total}
    case $name in
    # The tunnel's device.
    sockmesh_wg) continue ;;
    sockmesh_controller_connected) pattern="\"$name\"" ;;
    sockmesh_controller_*) pattern="\"$short\"" ;;
    *) pattern="\"$name\"" ;;
    esac
    grep -rqE -- "$pattern" node-proxy/src mesh-controller/src || bad "metric $name is written about and not made anywhere"
done < <(words '\bsockmesh_[a-z_]+[a-z]\b')

# Branches of the redirection.
while read -r name; do
    grep -qF "\"$name\"" redirect-bpf/programs/src/types.rs || bad "branch $name is written about; redirect-bpf/programs/src/types.rs has none such"
done < <(words '\b(connect|inbound|handoff|peername)_[a-z_0-9]+')

# What strict mode counts.
while read -r name; do
    grep -qF "\"$name\"" redirect-bpf/programs/src/tunnel/types.rs || bad "cause $name is written about; redirect-bpf/programs/src/tunnel/types.rs has none such"
done < <(words '\b(dropped|passed)_[a-z_]+[a-z]\b')

# Settings of the node and values of the chart, by the chart's schema.
values=$(python3 - charts/sockmesh/values.schema.json <<'PYTHON'
import json, sys

def names(schema, path):
    for name, below in schema.get("properties", {}).items():
        yield ".".join([*path, name])
        yield from names(below, [*path, name])

print("\n".join(names(json.load(open(sys.argv[1])), [])))
PYTHON
)
while read -r name; do
    grep -qxF -- "node.config.${name#node.config.}" <<<"$values" || bad "setting $name is written about and not among the node's settings"
done < <(words '(node\.config\.)?worker\.(threads|detection|timeouts|retries|limits|balancer|access_log|drain_deadline|same_node_mtls)(\.[a-z_0-9]+)*')
# The agent has sections `node` and `controller` of its own; what of them the chart makes itself is in config.rs alone.
while read -r name; do
    grep -qxF -- "$name" <<<"$values" && continue
    if [[ $name =~ ^(node|controller)\. ]] && grep -qE -- "^ {8}${name##*.}: " node-proxy/src/config.rs; then continue; fi
    bad "value $name is written about and not in the chart"
done < <(words '`(image|ca|controller|node|cni|wireguard|networkPolicy|monitoring|cleanup)\.[a-zA-Z._]+[:`]' | tr -d '`:' | grep -vE '^(ca\.(crt|md)|cni\.json)$')

# Links between files.
for document in "${documents[@]}"; do
    while read -r target; do
        [ -e "$(dirname "$document")/$target" ] || bad "$document links to $target, which does not exist"
    done < <(grep -oE '\]\([^)# ]+' "$document" | cut -c3- | grep -v '^https\?:' || true)
done

if [ "$failures" != 0 ]; then
    echo "documentation: $failures mistakes"
    exit 1
fi
echo "documentation: ok"
