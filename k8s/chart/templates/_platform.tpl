{{/* The name of the ConfigMap ends in a digest of its data, as kustomize writes it, so that a changed setting rolls out. */}}
{{- define "platform-name" -}}
{{- if gt (int .Values.hosts.min) (int .Values.hosts.max) }}{{ fail "hosts.min is above hosts.max" }}{{ end -}}
genmodels-platform-{{ dict "kind" "ConfigMap" "name" "" "data" .Values.platform | toJson | sha256sum | trunc 10 | replace "0" "g" | replace "1" "h" | replace "3" "k" | replace "a" "m" | replace "e" "t" }}
{{- end }}
