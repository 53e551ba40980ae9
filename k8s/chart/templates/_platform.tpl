{{/* The names of the ConfigMaps end in a digest of their data, as kustomize writes it, so that a changed setting rolls out. */}}
{{- define "platform-name" -}}
{{- if gt (int .Values.hosts.min) (int .Values.hosts.max) }}{{ fail "hosts.min is above hosts.max" }}{{ end -}}
genmodels-platform-{{ include "digest" .Values.platform }}
{{- end }}
{{- define "pools-name" -}}
genmodels-pools-{{ include "pools-data" . | fromJson | include "digest" }}
{{- end }}
{{- define "pools-data" -}}
{{ dict "pools.yaml" (tpl .Values.pools .) | toJson }}
{{- end }}
{{- define "digest" -}}
{{ dict "kind" "ConfigMap" "name" "" "data" . | toJson | sha256sum | trunc 10 | replace "0" "g" | replace "1" "h" | replace "3" "k" | replace "a" "m" | replace "e" "t" }}
{{- end }}
