#!/usr/bin/env bash
# The whole study with a real pretrained model: warm start, training, evaluations, log-prob gaps, a real server, memory,
# one JSON file. Can be interrupted and run again at any point. About three hours on two shared CPU cores.
#   studies/llm/run.sh RUNS
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the run and the measurements"}
base=models/sokoban-smollm2-base  # the recipe sokoban-smollm2 names it
parts=$runs/llm/parts
export OMP_NUM_THREADS=1
measure() { .venv/bin/python studies/llm/measure.py "$@"; }

.venv/bin/skillsd models fetch smollm2-135m
[ -x build/vllm/bin/python ] || make vllm-env

if [ ! -f $base/warm_start.json ]; then
    rm -rf $base  # of an interrupted warm start
    .venv/bin/skillsd sft sokoban-smollm2-base --out $base
fi
.venv/bin/skillsd train sokoban-smollm2 --out "$runs/sokoban-smollm2" --resume

measure evaluations "$parts" --base $base --run "$runs/sokoban-smollm2"
measure gap "$parts"
measure server "$parts"
measure server "$parts" --model $base --name server-warm-start
measure memory "$parts" --base $base
measure collect "$parts" --base $base --run "$runs/sokoban-smollm2" --json docs/results/llm.json
