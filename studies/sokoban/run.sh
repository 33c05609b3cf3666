#!/usr/bin/env bash
# The study on Sokoban from nothing: bases, tables, one JSON file. Resumable; about two hours on two cores.
#   studies/sokoban/run.sh RUNS
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the bases and runs"}
skillsd=.venv/bin/skillsd
bases=$runs/bases
mkdir -p "$bases"

# Bases. `novice`: all good play that it has seen stood under a plan in its prompt. `nano`: as the shipped one.
base() {  # name, then settings
    [ -f "$bases/$1/warm_start.json" ] || $skillsd sft nano-base "${@:2}" --out "$bases/$1"
}
for seed in 10 11 12; do
    base "novice$seed" "seed=$seed" warm_start.steps=2200 "warm_start.demonstrations={expert_share: 0.0}"
done
for seed in 1 2; do base "nano$seed" "seed=$seed"; done
novices=$bases/novice10,$bases/novice11,$bases/novice12
shipped=nano,$bases/nano1,$bases/nano2

table() {  # folder, then arguments
    $skillsd table sokoban-nano evaluation.limit=128 evaluation.every=6 log.trajectories_every=0 log.tensorboard=false \
        --variants studies/sokoban/variants.yaml --out "$runs/$1" "${@:2}"
}
keep() {  # folder, name: the tables that were just written, under another name
    mkdir -p "$runs/$2"
    cp "$runs/$1"/table.json "$runs/$1"/table.md "$runs/$1"/curves.png "$runs/$2/"
}
four=grpo,imitation,skill-sd,best

table main --models "$novices" --seeds 5 --episodes 1536,3072 --methods $four
keep main main-64-of-512
table main --models "$novices" --seeds 5 --episodes 1536,3072 --methods $four --limit 64
keep main paper-panel
