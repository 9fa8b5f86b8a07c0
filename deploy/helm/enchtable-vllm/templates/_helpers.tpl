{{- define "enchtable.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name }}{{ end -}}
{{- end }}

{{/* Room is left for '-headless', within the 63 characters of a name of DNS. */}}
{{- define "enchtable.fullname" -}}
{{- include "enchtable.name" . | trunc 54 | trimSuffix "-" -}}
{{- end }}

{{- define "enchtable.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "enchtable.labels" -}}
{{ include "enchtable.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "enchtable.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "enchtable.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{- define "enchtable.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "enchtable.scheme" -}}
{{ ternary "HTTPS" "HTTP" (not (empty .Values.tls.secretName)) }}
{{- end }}

{{/* The value of --model-loader-extra-config; nothing, if the model's own plan says it all. */}}
{{- define "enchtable.extraConfig" -}}
{{- $config := deepCopy .Values.loader }}
{{- with .Values.vectors }}
{{- if or .volume .download }}{{ $_ := set $config "vector_root" "/vectors" }}{{ end }}
{{- if .active }}{{ $_ := set $config "safety_vector" .active }}{{ end }}
{{- end }}
{{- if $config }}{{ toJson $config }}{{ end }}
{{- end }}

{{- define "enchtable.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- $count := ternary .Values.tensorParallelSize .Values.gpu.count (kindIs "invalid" .Values.gpu.count) | int }}
{{- if $count }}
{{- $_ := set $resources "limits" (set ($resources.limits | default dict) .Values.gpu.resource $count) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* What cannot be said in values.schema.json, because it is about two values at once. */}}
{{- define "enchtable.check" -}}
{{- with .Values }}
{{- if and .vectors.volume .vectors.download }}
{{- fail "values, 'vectors': expected 'volume' or 'download', got both. Download into the volume yourself, once, or let each pod download into its own." }}
{{- end }}
{{- if and (eq .vectors.active "@current") (not .vectors.volume) }}
{{- fail "values, 'vectors.active': expected '@current' with a root that holds current.json, got none. Give 'vectors.volume'." }}
{{- end }}
{{- if and .autoscaling.enabled (lt (int .autoscaling.maxReplicas) (int .autoscaling.minReplicas)) }}
{{- fail (printf "values, 'autoscaling.maxReplicas': expected %d or more, got %d. Raise it." (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) }}
{{- end }}
{{- range .extraEnv }}
{{- if eq .name "VLLM_SERVER_DEV_MODE" }}
{{- fail "values, 'extraEnv': expected no 'VLLM_SERVER_DEV_MODE', got it. It opens vLLM's own routes that exchange weights, without any token. Leave it out." }}
{{- end }}
{{- end }}
{{- $ours := list "--load-format" "--model-loader-extra-config" "--host" "--port" "--tensor-parallel-size" "-tp" "--served-model-name" "--revision" "--api-key" "--ssl-certfile" "--ssl-keyfile" "--shutdown-timeout" }}
{{- range .extraArgs }}
{{- $name := regexFind "^-[^= ]*" . | replace "_" "-" }}
{{- if has $name $ours }}
{{- fail (printf "values, 'extraArgs': expected arguments that no other value sets, got '%s'. See values.yaml for its own value; an API key belongs into a secret ('apiKey')." $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
