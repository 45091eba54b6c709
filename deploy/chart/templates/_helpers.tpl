{{- define "mrsa.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if or (contains $name .Release.Name) (contains .Release.Name $name) -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a component: (list . "server"). */}}
{{- define "mrsa.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "mrsa.labels" -}}
{{- $root := index . 0 -}}
{{ include "mrsa.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image: (list . given target); what is not given is that of `image`, and the tag the Dockerfile's target. */}}
{{- define "mrsa.image" -}}
{{- $root := index . 0 -}}{{- $given := index . 1 -}}{{- $usual := $root.Values.image -}}
{{- $registry := default $usual.registry $given.registry -}}
{{- $repository := default $usual.repository $given.repository -}}
{{- with $registry }}{{ . }}/{{ end }}{{ $repository }}
{{- if $given.digest }}@{{ $given.digest }}
{{- else }}:{{ default (printf "%s-%s" $root.Chart.AppVersion (index . 2)) $given.tag }}
{{- end -}}
{{- end -}}

{{/* Which target of the Dockerfile the servers run. */}}
{{- define "mrsa.serverTarget" -}}
{{- ternary .Values.accelerator.kind "server" (eq .Values.shape "single") -}}
{{- end -}}

{{- define "mrsa.hasPool" -}}
{{- if and (eq .Values.shape "pool") (not .Values.engine.externalUrl) }}true{{ end -}}
{{- end -}}

{{/* Whether the pool is scaled to zero at rest. */}}
{{- define "mrsa.sleeps" -}}
{{- if and (include "mrsa.hasPool" .) .Values.engine.keda.enabled (eq (int .Values.engine.keda.minReplicas) 0) }}true{{ end -}}
{{- end -}}

{{/* Where the weights are, in the pod. */}}
{{- define "mrsa.modelPath" -}}
{{- if eq .Values.model.source "pvc" -}}
{{- $path := default (printf "/models/%s" (default "first" .Values.model.revision)) .Values.model.path -}}
{{- if not (hasPrefix "/models/" $path) }}{{ fail "model.path: the claim is mounted at /models, so a folder below it" }}{{ end -}}
{{- $path -}}
{{- else if eq .Values.model.source "image" -}}
/models{{ with .Values.model.path }}/{{ trimPrefix "/" . }}{{ end }}
{{- else -}}
{{ .Values.model.path }}
{{- end -}}
{{- end -}}

{{- define "mrsa.modelClaim" -}}
{{- default (printf "%s-models" (include "mrsa.fullname" .)) .Values.model.pvc.existingClaim -}}
{{- end -}}

{{/* Whether one pod alone reads the claim of weights: then any storage will do, if the Job goes to that pod's node. */}}
{{- define "mrsa.modelIsAlone" -}}
{{- $one := and (eq (int .Values.server.replicas) 1) (not .Values.server.hpa.enabled) (not .Values.knative.enabled) -}}
{{- if and (eq .Values.shape "single") $one (not (has "ReadWriteMany" .Values.model.pvc.accessModes)) }}true{{ end -}}
{{- end -}}

{{- define "mrsa.modelVolume" -}}
{{- if eq .Values.model.source "pvc" -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "mrsa.modelClaim" . }}
    readOnly: true
{{- else if eq .Values.model.source "image" -}}
- name: models
  image:
    reference: {{ required "model.image.reference" .Values.model.image.reference }}
    pullPolicy: {{ .Values.model.image.pullPolicy }}
{{- end }}
{{- end -}}

{{- define "mrsa.modelMount" -}}
{{- if ne .Values.model.source "none" -}}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- end -}}

{{/* Waits for the download Job's mark: (list . image pullPolicy). */}}
{{- define "mrsa.awaitModel" -}}
{{- $root := index . 0 -}}
{{- if and (eq $root.Values.model.source "pvc") $root.Values.model.pvc.download -}}
- name: weights
  image: {{ index . 1 }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [/bin/sh, -c]
  args: ['until [ -f "$0/.complete" ]; do echo "waiting for $0"; sleep 5; done', {{ include "mrsa.modelPath" $root | quote }}]
  securityContext: {{- include "mrsa.containerSecurity" $root | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 64Mi}
  volumeMounts: {{- include "mrsa.modelMount" $root | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "mrsa.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
{{- if not .Values.knative.enabled }}{{/* Knative's webhook refuses it. */}}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "mrsa.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "mrsa.spread" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.topologySpread -}}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "mrsa.selector" (list $root (index $ 1)) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Limits and requests with the GPUs of a pod: (list . resources). */}}
{{- define "mrsa.gpuResources" -}}
{{- $root := index . 0 -}}
{{- $resources := deepCopy (index . 1) -}}
{{- with $root.Values.accelerator.resource -}}
{{- $gpus := dict . (toString $root.Values.accelerator.count) -}}
{{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "mrsa.databaseEnv" -}}
- name: MRSA_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ required "store.postgres.existingSecret: the Secret with the URL of the database" .Values.store.postgres.existingSecret }}
      key: {{ .Values.store.postgres.key }}
{{- end -}}

{{/* The Secret with the keys of clients; nothing where anybody may ask. */}}
{{- define "mrsa.keysSecret" -}}
{{- if not .Values.auth.open -}}
{{- default (printf "%s-keys" (include "mrsa.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* What Prometheus sends to read metrics. */}}
{{- define "mrsa.scrapeKey" -}}
{{- with include "mrsa.keysSecret" . -}}
authorization:
  type: Bearer
  credentials: {name: {{ . }}, key: metrics}
{{- end -}}
{{- end -}}

{{/* What the chart decides of the server's settings, under what the values say. */}}
{{- define "mrsa.settings" -}}
{{- $settings := dict "host" "0.0.0.0" "port" 8000 "log_format" "json" -}}
{{- $server := .Values.server -}}
{{- $grace := sub (sub (int $server.terminationGracePeriodSeconds) (int $server.preStopSeconds)) 20 -}}
{{- if lt (int $grace) 0 -}}
{{- fail "server.terminationGracePeriodSeconds: at least preStopSeconds and 20 more" -}}
{{- end -}}
{{- $_ := set $settings "shutdown_grace_s" $grace -}}
{{- if .Values.auth.open }}{{ $_ := set $settings "open" true }}
{{- else }}{{ $_ := set $settings "keys_file" "/etc/mrsa/keys/keys" }}{{ end -}}
{{- with .Values.model.name }}{{ $_ := set $settings "served_model" . }}{{ end -}}
{{- if eq .Values.store.kind "file" }}{{ $_ := set $settings "state_dir" "/var/lib/mrsa" }}{{ end -}}
{{- if eq .Values.store.kind "memory" }}{{ $_ := set $settings "state_dir" "none" }}{{ end -}}
{{- if eq .Values.shape "pool" -}}
{{- $_ := set $settings "engine" "openai" -}}
{{- $url := printf "http://%s-router.%s.svc:8001/v1" (include "mrsa.fullname" .) .Release.Namespace -}}
{{- $_ := set $settings "engine_url" (default $url .Values.engine.externalUrl) -}}
{{- with .Values.model.name }}{{ $_ := set $settings "model" . }}{{ end -}}
{{- if include "mrsa.hasPool" . }}{{ $_ := set $settings "engine_priority" true }}{{ end -}}
{{- if include "mrsa.sleeps" . -}}
{{- $_ := set $settings "engine_sleeps" true -}}
{{- $_ := set $settings "engine_wait_s" (mul 60 (int .Values.engine.startupMinutes)) -}}
{{- end -}}
{{- else if eq .Values.accelerator.kind "cpu" -}}
{{- $_ := set $settings "engine" "embedded" -}}
{{- else -}}
{{- $_ := set $settings "engine" "vllm" -}}
{{- $_ := set $settings "model" (required "model.source or model.path: which weights?" (include "mrsa.modelPath" .)) -}}
{{- end -}}
{{- if and (eq .Values.shape "single") (ne .Values.accelerator.kind "cpu") (gt (int .Values.accelerator.count) 1) -}}
{{- $args := default dict $server.settings.engine_args -}}
{{- if not (contains "parallel_size" (toJson $args)) -}}
{{- $args = set (deepCopy $args) "tensor_parallel_size" (int .Values.accelerator.count) -}}
{{- end -}}
{{- $_ := set $settings "engine_args" $args -}}
{{- end -}}
{{- /* Not by `merge`, for which false and 0 are nothing that was said. */}}
{{- range $name, $value := $server.settings }}
{{- if not (and (eq $name "engine_args") (hasKey $settings $name)) }}{{ $_ := set $settings $name $value }}{{ end }}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{- define "mrsa.serverEnv" -}}
{{- range $name, $value := fromYaml (include "mrsa.settings" .) }}
{{- if not (kindIs "invalid" $value) }}
- name: MRSA_{{ upper $name }}
  {{- if kindIs "string" $value }}
  value: {{ $value | quote }}
  {{- else if kindIs "float64" $value }}
  value: {{ ternary (int64 $value | toString) ($value | toString) (eq (floor $value) $value) | quote }}
  {{- else }}
  value: {{ $value | toJson | quote }}
  {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "mrsa.tracingEnv" -}}
{{- with .Values.tracing.endpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
- {name: OTEL_SERVICE_NAME, value: {{ include "mrsa.fullname" $ }}}
{{- if $.Values.knative.enabled }}{{/* which takes no fieldRef as it comes */}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: k8s.namespace.name={{ $.Release.Namespace }}}
{{- else }}
- {name: K8S_POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.namespace.name={{ $.Release.Namespace }},k8s.pod.name=$(K8S_POD_NAME)"}
{{- end }}
{{- end }}
{{- end -}}

{{/* The pod of a server, for a Deployment and for Knative. */}}
{{- define "mrsa.serverPod" -}}
{{- $server := .Values.server -}}
{{- $single := eq .Values.shape "single" -}}
{{- $image := include "mrsa.image" (list . .Values.image (include "mrsa.serverTarget" .)) -}}
serviceAccountName: {{ include "mrsa.fullname" . }}-server
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- if not .Values.knative.enabled }}
terminationGracePeriodSeconds: {{ $server.terminationGracePeriodSeconds }}
{{- end }}
{{- with $server.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with (ternary .Values.accelerator.runtimeClassName "" $single) }}
runtimeClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "mrsa.podSecurity" . | nindent 2 }}
  {{- if and $single .Values.accelerator.groups }}
  supplementalGroups: {{ toJson .Values.accelerator.groups }}
  {{- end }}
{{- with merge (deepCopy $server.nodeSelector) (ternary .Values.accelerator.nodeSelector dict $single) }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat $server.tolerations (ternary .Values.accelerator.tolerations list $single) }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $server.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if not .Values.knative.enabled }}
{{- with include "mrsa.spread" (list . "server") }}
{{ . }}
{{- end }}
{{- end }}
{{- $await := ternary (include "mrsa.awaitModel" (list . $image)) "" $single }}
{{- $migrates := and (eq .Values.store.kind "postgres") (eq .Values.store.postgres.migrate "init") }}
{{- if or $await $migrates }}
initContainers:
  {{- if $migrates }}
  - name: migrate
    image: {{ $image }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [mrsa, db, upgrade]
    env:
      {{- include "mrsa.databaseEnv" . | nindent 6 }}
      {{- with $server.extraEnv }}{{ toYaml . | nindent 6 }}{{ end }}
    securityContext: {{- include "mrsa.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 100m, memory: 128Mi}
      limits: {cpu: "1", memory: 512Mi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- with $server.extraVolumeMounts }}{{ toYaml . | nindent 6 }}{{ end }}
  {{- end }}
  {{- with $await }}{{ . | nindent 2 }}{{ end }}
{{- end }}
containers:
  - name: server
    image: {{ $image }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    ports:
      - name: {{ ternary "http1" "http" .Values.knative.enabled }}
        containerPort: 8000
    env:
      {{- include "mrsa.serverEnv" . | trim | nindent 6 }}
      {{- if eq .Values.store.kind "postgres" }}
      {{- include "mrsa.databaseEnv" . | nindent 6 }}
      {{- end }}
      {{- if $single }}
      - {name: HF_HUB_OFFLINE, value: "1"}
      {{- end }}
      {{- with include "mrsa.tracingEnv" . }}{{ . | trim | nindent 6 }}{{ end }}
      {{- with $server.extraEnv }}{{ toYaml . | nindent 6 }}{{ end }}
    {{- if $single }}
    # Ready when the engine has loaded, which may take long; by then it is alive.
    {{- end }}
    startupProbe:
      httpGet: {path: {{ ternary "/health/ready" "/health/live" $single }}, port: 8000}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: {{ mul 6 (int $server.startupMinutes) }}
    readinessProbe:
      httpGet: {path: /health/ready, port: 8000}
      periodSeconds: 5
      timeoutSeconds: 5
      failureThreshold: 3
    livenessProbe:
      httpGet: {path: /health/live, port: 8000}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    {{- if not .Values.knative.enabled }}
    lifecycle:
      preStop: {sleep: {seconds: {{ $server.preStopSeconds }}}}
    {{- end }}
    securityContext: {{- include "mrsa.containerSecurity" . | nindent 6 }}
    resources:
      {{- if $single }}
      {{- include "mrsa.gpuResources" (list . $server.resources) | nindent 6 }}
      {{- else }}
      {{- toYaml $server.resources | nindent 6 }}
      {{- end }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if not .Values.auth.open }}
      - {name: keys, mountPath: /etc/mrsa/keys, readOnly: true}
      {{- end }}
      {{- if $single }}
      - {name: cache, mountPath: /cache}
      - {name: shm, mountPath: /dev/shm}
      {{- with include "mrsa.modelMount" . }}{{ . | nindent 6 }}{{ end }}
      {{- end }}
      {{- if eq .Values.store.kind "file" }}
      - {name: state, mountPath: /var/lib/mrsa}
      {{- end }}
      {{- with $server.extraVolumeMounts }}{{ toYaml . | nindent 6 }}{{ end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
  {{- with include "mrsa.keysSecret" . }}
  - name: keys
    secret:
      secretName: {{ . }}
      defaultMode: 0440
      items: [{key: keys, path: keys}]
  {{- end }}
  {{- if $single }}
  - name: cache
    {{- include "mrsa.cacheVolume" $server.cache | nindent 4 }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.engine.shmSize }}}
  {{- with include "mrsa.modelVolume" . }}{{ . | nindent 2 }}{{ end }}
  {{- end }}
  {{- if eq .Values.store.kind "file" }}
  - name: state
    persistentVolumeClaim:
      claimName: {{ default (printf "%s-state" (include "mrsa.fullname" .)) .Values.store.file.existingClaim }}
  {{- end }}
  {{- with $server.extraVolumes }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end -}}

{{- define "mrsa.cacheVolume" -}}
{{- if .existingClaim -}}
persistentVolumeClaim: {claimName: {{ .existingClaim }}}
{{- else -}}
emptyDir: {sizeLimit: {{ .sizeLimit }}}
{{- end -}}
{{- end -}}
