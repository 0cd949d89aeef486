{{/*
Names are fixed: a cluster has one mesh, and certificates, RBAC and the nodes' configuration refer to these names.
*/}}
{{- define "sockmesh.controller" -}}sockmesh-controller{{- end }}
{{- define "sockmesh.node" -}}sockmesh-node{{- end }}
{{- define "sockmesh.cleanup" -}}sockmesh-cleanup{{- end }}
{{- define "sockmesh.test" -}}sockmesh-test{{- end }}
{{/*
Made by the controller: the roots for the nodes; what replicas tell each other (acknowledgements while a root is replaced, and
which pods are gone, in sixteen parts); the election; in mode self-signed the CA.
*/}}
{{- define "sockmesh.trust" -}}sockmesh-trust{{- end }}
{{- define "sockmesh.configMaps" -}}
{{ include "sockmesh.trust" . }} sockmesh-acks {{- range splitList "" "0123456789abcdef" }} sockmesh-ledger-{{ . }}{{ end }}
{{- end }}
{{- define "sockmesh.lease" -}}sockmesh-controller{{- end }}
{{- define "sockmesh.caSecret" -}}{{ if eq .Values.ca.mode "secret" }}{{ .Values.ca.secret }}{{ else }}sockmesh-ca{{ end }}{{- end }}
{{/* Audience of the nodes' tokens, and the name in the certificate of the controller's endpoint. */}}
{{- define "sockmesh.audience" -}}sockmesh-controller{{- end }}
{{- define "sockmesh.endpoint" -}}{{ include "sockmesh.controller" . }}.{{ .Release.Namespace }}.svc{{- end }}

{{/* Call with (list $ name). */}}
{{- define "sockmesh.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{- define "sockmesh.labels" -}}
{{- $top := index . 0 -}}
{{ include "sockmesh.selector" . }}
app.kubernetes.io/part-of: sockmesh
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ $top.Chart.Name }}-{{ $top.Chart.Version }}
{{- end }}

{{/* Call with (list $ .Values.<part>.image). */}}
{{- define "sockmesh.image" -}}
{{- $top := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $top.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $top.Values.image.tag | default $top.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "sockmesh.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Call with (list address port). */}}
{{- define "sockmesh.socket" -}}
{{- $address := index . 0 -}}
{{- if contains ":" $address }}[{{ $address }}]{{ else }}{{ $address }}{{ end }}:{{ index . 1 }}
{{- end }}

{{/* Call with (list $ port). */}}
{{- define "sockmesh.scrape" -}}
{{- if (index . 0).Values.monitoring.annotations }}
prometheus.io/scrape: "true"
prometheus.io/port: {{ index . 1 | quote }}
prometheus.io/path: /metrics
{{- end }}
{{- end }}

{{/*
The node's file of settings: `node.config`, and what follows from other values. The CNI plugin runs outside of the container,
so it is told the host's paths. The mesh's own pods must come up without it.
*/}}
{{- define "sockmesh.nodeConfig" -}}
{{- $exempt := dig "node" "cni" "exempt_namespaces" (list "kube-system") .Values.node.config -}}
{{- $cni := dict "enabled" .Values.cni.enabled "exempt_namespaces" (append $exempt .Release.Namespace | uniq) -}}
{{- $_ := set $cni "socket" (printf "%s/agent.sock" .Values.node.host.run) -}}
{{- $_ = set $cni "knowledge" (printf "%s/cni.json" .Values.node.host.state) -}}
{{- $node := dict "discover_pods" true "netns_dir" .Values.node.host.netns "cni" $cni -}}
{{- $processes := dict "takeover_drain" (printf "%ds" (int .Values.node.drainSeconds)) -}}
{{- $own := dict "node" $node "processes" $processes -}}
{{- if .Values.wireguard.enabled }}
{{- $wireguard := dict }}
{{- range $name, $value := .Values.wireguard }}
{{- $_ = set $wireguard (snakecase $name) $value }}
{{- end }}
{{- $_ = set $own "wireguard" $wireguard }}
{{- end -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.node.config) $own) -}}
{{- end }}

{{/* What single values cannot know of each other. Each message: which value, what is wrong, what to do. */}}
{{- define "sockmesh.check" -}}
{{- if and (eq .Values.ca.mode "secret") (not .Values.ca.secret) }}
{{- fail "ca.secret is empty, and ca.mode is \"secret\": name the Secret that holds the CA (tls.crt, tls.key, ca.crt), or use ca.mode \"self-signed\"" }}
{{- end }}
{{- if and (eq .Values.ca.mode "self-signed") .Values.ca.secret }}
{{- fail (printf "ca.secret is %q, and ca.mode is \"self-signed\", which would leave it unused: set ca.mode to \"secret\", or leave ca.secret empty" .Values.ca.secret) }}
{{- end }}
{{- $surge := not (has (toString .Values.node.maxSurge) (list "0" "0%")) }}
{{- $unavailable := not (has (toString .Values.node.maxUnavailable) (list "0" "0%")) }}
{{- if eq $surge $unavailable }}
{{- fail (printf "node.maxSurge is %v and node.maxUnavailable is %v: exactly one of them has to be 0 (maxSurge 1 and maxUnavailable 0 replace proxies without closing connections)" .Values.node.maxSurge .Values.node.maxUnavailable) }}
{{- end }}
{{- if and (ne .Values.wireguard.strict "off") (not .Values.wireguard.enabled) }}
{{- fail (printf "wireguard.strict is %q, and wireguard.enabled is false: there is no tunnel by which packets could go instead of being dropped. Set wireguard.enabled to true, or wireguard.strict to \"off\"" .Values.wireguard.strict) }}
{{- end }}
{{- $mtu := int .Values.wireguard.mtu }}
{{- if and (ne $mtu 0) (or (lt $mtu 1280) (gt $mtu 65535)) }}
{{- fail (printf "wireguard.mtu is %d: IPv6 needs 1280 bytes, and no packet has more than 65535. 0 derives it from the node's interface" $mtu) }}
{{- end }}
{{- $admin := .Values.node.adminAddress | default .Values.bindAddress }}
{{- if and .Values.monitoring.podMonitor.enabled (has $admin (list "127.0.0.1" "::1")) }}
{{- fail (printf "node.adminAddress is %q, where Prometheus cannot reach it, and monitoring.podMonitor.enabled is true: change one of them" $admin) }}
{{- end }}
{{- end }}
