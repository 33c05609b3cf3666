#!/usr/bin/env bash
# A small model on our AppWorld tasks (the real engine, not the AppWorld benchmark): warm start, GRPO and Skill-SD on two
# seeds, uplift of the skills, attacks, speed, one JSON file. Can be interrupted and run again at any point.
#   studies/appworld/run.sh RUNS
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the runs"}
base=models/appworld-smoke-base  # the recipe appworld-smoke names it
skillsd=.venv/bin/skillsd

$skillsd envs setup appworld
if [ ! -f $base/warm_start.json ]; then
    rm -rf $base  # of an interrupted warm start
    $skillsd sft appworld-smoke-base --out $base
fi
# The recipe had lambda 0.03 when the table was made; 0.3, its value now, is one more run.
$skillsd table appworld-smoke log.tensorboard=false objective.lambda_sdl=0.03 --methods grpo,skill-sd --seeds 2 --split dev --samples 4 \
    --out "$runs/table-appworld-smoke"
cells="$runs/table-appworld-smoke/appworld-smoke-base"
more="$runs/appworld-lambda"
[ -f "$more.json" ] || {
    $skillsd train appworld-smoke log.tensorboard=false --out "$more" $([ ! -d "$more" ] || echo --resume)
    $skillsd eval "$more" --split dev --samples 4 --json "$more.json"
}
mkdir -p "$runs/appworld-test"
[ -f "$runs/appworld-test/base-0.json" ] || $skillsd eval --model $base --recipe appworld-smoke --split test --samples 4 \
    --temperature 1 --json "$runs/appworld-test/base-0.json"
for run in "$cells"/grpo/seed-{0,1} "$cells"/skill-sd/seed-{0,1} "$more"; do
    name=$(basename "$(dirname "$run")")-$(basename "$run")
    [ "$run" != "$more" ] || name=lambda
    [ -f "$runs/appworld-test/$name.json" ] || $skillsd eval "$run" --split test --samples 4 --temperature 1 \
        --json "$runs/appworld-test/$name.json"
done
[ -f "$runs/uplift.json" ] || $skillsd skills uplift "$cells/skill-sd/seed-0" --at base --limit 8 --episodes 4 \
    --json "$runs/uplift.json"
[ -f "$runs/speed.json" ] || .venv/bin/python benchmarks/appworld.py --json "$runs/speed.json"
# A failed test means that an attack succeeds: it is reported, and the study goes on.
.venv/bin/python -m pytest tests/envs/test_appworld_attacks.py -k test_attack -p no:cacheprovider --junitxml "$runs/attacks.xml" || [ $? = 1 ]
.venv/bin/python studies/appworld/collect.py "$runs" docs/results/appworld.json
