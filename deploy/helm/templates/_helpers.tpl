{{- define "lkjwt.name" -}}
{{- if contains "lkjwt" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-lkjwt" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "lkjwt.selector" -}}
app.kubernetes.io/name: lkjwt
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lkjwt.meta" -}}
name: {{ include "lkjwt.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lkjwt.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "lkjwt.secret" -}}
{{- .Values.secret.existing | default (printf "%s-keys" (include "lkjwt.name" .)) }}
{{- end }}

{{- /* Faults of the values, before anything is applied. */ -}}
{{- define "lkjwt.faults" -}}
{{- $s := .Values.secret }}
{{- if not .Values.homeservers }}
{{- fail "homeservers: name the servers whose users may create rooms" }}
{{- end }}
{{- if and (gt (int .Values.replicas) 1) (not .Values.redis.url) }}
{{- fail "several replicas share delegated leaves by Redis: set redis.url, or replicas=1" }}
{{- end }}
{{- if not (or $s.existing $s.keys $s.external.enabled) }}
{{- fail "secret: set one of existing, keys, external.enabled" }}
{{- end }}
{{- if and $s.external.enabled (not $s.external.store.name) }}
{{- fail "secret.external.store.name: which store?" }}
{{- end }}
{{- if .Values.applicationService.serverName }}
{{- if and $s.keys (not $s.existing) (not $s.external.enabled) (not $s.registration) }}
{{- fail "applicationService: secret.registration is empty" }}
{{- end }}
{{- if and $s.external.enabled (not $s.external.registration) }}
{{- fail "applicationService: secret.external.registration is empty" }}
{{- end }}
{{- end }}
{{- if .Values.redis.password }}
{{- if and $s.keys (not $s.existing) (not $s.redisPassword) }}
{{- fail "redis.password: secret.redisPassword is empty" }}
{{- end }}
{{- if and $s.external.enabled (not $s.external.redisPassword) }}
{{- fail "redis.password: secret.external.redisPassword is empty" }}
{{- end }}
{{- end }}
{{- end }}
