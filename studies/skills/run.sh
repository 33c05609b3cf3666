#!/usr/bin/env bash
# The study of when a skill teaches: base models, tuning, tables, one JSON file. Can be interrupted and run again at any
# point. A run takes about half a minute of an idle core; all of it, about 300 runs, two hours on two cores.
#   studies/skills/run.sh RUNS [PART ...]      parts: tuning main conditions rows reading ucb; default: all
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the base models and the runs"}
shift
parts=${*:-"tuning main conditions rows reading ucb"}
export PYTHONPATH=studies/skills${PYTHONPATH:+:$PYTHONPATH}
skillsd=".venv/bin/python -m skillsd"
bases=$runs/bases
mkdir -p "$bases"

# -- base models: the recipe's seed 0 is the shipped one
for seed in 0 1 2; do
    [ -f "$bases/rb$seed/warm_start.json" ] || $skillsd sft rulebook-base "seed=$seed" --out "$bases/rb$seed"
done
models=$bases/rb0,$bases/rb1,$bases/rb2

table() {  # folder, then arguments; a world for each seed
    $skillsd table rulebook-nano log.tensorboard=false --variants studies/skills/variants.yaml --models "$models" \
        --seeds 5 --episodes 6144 --out "$runs/$1" "${@:2}"
}
labels() { grep -o '^[a-z0-9-]*' "$1" | paste -sd,; }

for part in $parts; do
    case $part in
    tuning)  # on the tuning tasks of a world of its own
        $skillsd table rulebook-nano environment.options.world=100 evaluation.every=0 log.tensorboard=false \
            --models "$bases/rb0" --variants studies/skills/tuning.yaml --methods "$(labels studies/skills/tuning.yaml)" \
            --split tune --samples 2 --episodes 6144 --out "$runs/tuning" ;;
    main)  # success is all that counts, and failures tell
        table main --methods grpo,imitation,synchronised,averaged,frozen,misled ;;
    conditions)  # one property taken away, or both
        for given in "reward=completion failures=telling" "reward=success failures=mute" \
            "reward=completion failures=mute"; do
            read -r reward failures <<<"$given"
            table "${reward#*=}-${failures#*=}" "environment.options={world: \$seed, reward: ${reward#*=}, failures: ${failures#*=}}" \
                --methods grpo,imitation,synchronised,averaged,frozen,misled
        done ;;
    rows)  # the paper's other rows
        table main --methods grpo,other-task,opsd,opd,skill-grpo ;;
    reading)  # a teacher that keeps reading, over a longer training
        table long evaluation.every=16 --episodes 51200 \
            --methods grpo,frozen,synchronised,averaged,practice,grpo-practice,mixed,replay,gated,averaged-practice ;;
    ucb)  # does it matter which skill is picked?
        table main --methods grpo,frozen,frozen-best,frozen-prior,frozen-one,frozen-change,frozen-random,frozen-worst ;;
    *)
        echo "unknown part $part" >&2
        exit 2 ;;
    esac
done
.venv/bin/python studies/skills/collect.py "$runs" docs/results/skills.json
