#!/bin/bash
# Adds our package to a Python that has vLLM: what is there stays as it is, what is missing comes as tested.
# add-to-vllm.sh WHEELS REQUIREMENTS, with PYTHON for another than python3
set -euo pipefail
wheels=$1 requirements=$2 python=${PYTHON:-python3}
work=$(mktemp --directory)
trap 'rm --recursive "$work"' EXIT
"$python" -m pip list --format=freeze >"$work/held.txt"
# NAME==VERSION of each requirement whose name, as PEP 503 writes it, is not there yet.
awk -F'==' '
	{ name = tolower($1); gsub(/[-_.]+/, "-", name) }
	NR == FNR { held[name]; next }
	/^[A-Za-z0-9._-]+==/ && !(name in held) { sub(/[ ;].*/, ""); print }
' "$work/held.txt" "$requirements" >"$work/missing.txt"
"$python" -m pip install \
	--constraint "$work/held.txt" --constraint "$work/missing.txt" "$(echo "$wheels"/mrsa_server-*.whl)[otel,postgres]"
