#!/usr/bin/env bash
# The whole study on Sokoban: base models, tables, one JSON file. Can be interrupted and run again at any point. Takes
# about two hours on two idle cores, 20 minutes of it for the base models.
#   studies/sokoban/run.sh RUNS
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the base models and the runs"}
skillsd=.venv/bin/skillsd
bases=$runs/bases
mkdir -p "$bases"

# -- base models: the shipped one, and two more from its recipe
for seed in 1 2; do
    [ -f "$bases/nano$seed/warm_start.json" ] || $skillsd sft nano-base "seed=$seed" --out "$bases/nano$seed"
done

# -- tables
table() {  # folder, then arguments
    $skillsd table sokoban-nano evaluation.limit=128 evaluation.every=6 log.trajectories_every=0 log.tensorboard=false \
        --models "nano,$bases/nano1,$bases/nano2" --variants studies/sokoban/variants.yaml --episodes 1536,3072 \
        --out "$runs/$1" "${@:2}"
}
keep() {  # folder, name: copy the table that was just written, as the next one may go into the same folder
    mkdir -p "$runs/tables/$2"
    cp "$runs/$1"/table.json "$runs/$1"/table.md "$runs/$1"/curves.png "$runs/tables/$2/"
}

table main --seeds 5 --methods grpo,imitation,skill-sd,best,skill-sd-frozen
keep main main
table main --seeds 5 --methods grpo,imitation,skill-sd,best,skill-sd-frozen --limit 64
keep main main-64
table main --methods grpo,skill-sd,skill-grpo,opd,opsd,grpo-opsd,skill-sd-frozen,teacher-rollouts,teacher-rollouts-frozen
keep main rows
table main --methods grpo,best,oracle,best-shuffled,best-frozen
keep main content
table hard --seeds 2 --methods grpo,imitation,skill-sd,best \
    "environment.options={preset: nano-hard}" rollout.tasks_per_iteration=32 rollout.group_size=4
keep hard hard

.venv/bin/python studies/sokoban/collect.py "$runs/tables" docs/results/sokoban.json
