#!/usr/bin/env bash
# The study on Sokoban from nothing: base models, tables, one JSON file. Resumable at any point; two to three hours on two
# cores, half of it for the base models.
#   studies/sokoban/run.sh RUNS
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the bases and runs"}
skillsd=.venv/bin/skillsd
bases=$runs/bases
mkdir -p "$bases"

# -- base models: `nano` as the shipped one; `novice`: all good play that it has seen stood under a plan in its prompt
base() {  # name, then settings
    [ -f "$bases/$1/warm_start.json" ] || $skillsd sft nano-base "${@:2}" --out "$bases/$1"
}
base nano1 seed=1
base nano2 seed=2
for seed in 10 11 12; do
    base "novice$seed" "seed=$seed" warm_start.steps=2200 "warm_start.demonstrations={expert_share: 0.0}"
done
shipped="--models nano,$bases/nano1,$bases/nano2"
novices="--models $bases/novice10,$bases/novice11,$bases/novice12"

# -- tables
table() {  # folder, then arguments
    $skillsd table sokoban-nano evaluation.limit=128 evaluation.every=6 log.trajectories_every=0 log.tensorboard=false \
        --variants studies/sokoban/variants.yaml --episodes 1536,3072 --out "$runs/$1" "${@:2}"
}
keep() {  # folder, name: the table that was just written, under a name of its own (the next one goes into the same folder)
    mkdir -p "$runs/tables/$2"
    cp "$runs/$1"/table.json "$runs/$1"/table.md "$runs/$1"/curves.png "$runs/tables/$2/"
}
four=grpo,imitation,skill-sd,best

table main $shipped --seeds 5 --methods $four
keep main main
table main $shipped --seeds 5 --methods $four --limit 64
keep main main-64
table main $shipped --methods \
    grpo,skill-sd,skill-grpo,opd,opsd,grpo-opsd,skill-sd-frozen,teacher-rollouts,teacher-rollouts-frozen
keep main rows
table main $shipped --methods grpo,best,oracle,best-shuffled,best-failures,best-frozen,best-alone
keep main content
table hard $shipped --methods $four \
    "environment.options={preset: nano-hard}" rollout.tasks_per_iteration=32 rollout.group_size=4
keep hard hard
table novice $novices --methods $four,best-frozen
keep novice novice
table main $shipped --methods grpo,skill-sd,shuffled,successes,failures,empty,last,random
keep main skill-side

.venv/bin/python studies/sokoban/collect.py "$runs/tables" docs/results/sokoban.json
