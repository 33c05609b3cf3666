#!/usr/bin/env bash
# A small model on our AppWorld tasks (the real engine, not the AppWorld benchmark): warm start, then the base model, GRPO
# and Skill-SD on three seeds, uplift of the skills, attacks, speed, one JSON file.
#   studies/appworld/run.sh RUNS      # a new folder, or that of an interrupted study of the same tasks
# Can be interrupted and run again at any point. RUNS/times.tsv has the seconds of each step that ended.
# Estimate for two otherwise idle cores, from the times of the earlier study (docs/results/appworld.md): warm start 10
# minutes; six trainings of 12 iterations of 110 s, two at a time, 70; their evaluation and the base's on dev, also two at
# a time, 30; on test, one after the other, 50; uplift 5; attacks and speed 10. Three hours in all.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:?"give a folder for the runs"}
methods=${METHODS:-grpo,skill-sd}
seeds=3
base=models/appworld-smoke-base  # the recipe appworld-smoke names it
skillsd=.venv/bin/skillsd
mkdir -p "$runs/appworld-test"

timed() {  # timed NAME COMMAND ...: run it, and note its seconds and exit status
    local begin=$SECONDS status=0
    "${@:2}" || status=$?
    printf '%s\t%s\t%s\n' "$1" $((SECONDS - begin)) $status >> "$runs/times.tsv"
    return $status
}

base_is_current() {  # whether there is a warm start that ended, on the present tasks
    .venv/bin/python - $base/warm_start.json <<'END'
import json, sys
from pathlib import Path
from skillsd import config
from skillsd.envs import registry
from skillsd.warm_start.sft import demonstrations_fingerprint
recipe = config.load(config.SftConfig, "appworld-smoke-base", ())
tasks = registry.load(recipe.environment.name, recipe.environment.options)
made = Path(sys.argv[1])
sys.exit(not made.is_file() or json.loads(made.read_text()).get("demonstrations") != demonstrations_fingerprint(recipe, tasks))
END
}

timed set-up $skillsd envs setup appworld
if ! base_is_current; then
    rm -rf $base  # interrupted, or of other tasks
    timed warm-start $skillsd sft appworld-smoke-base --out $base
fi
timed table $skillsd table appworld-smoke log.tensorboard=false --methods "$methods" --seeds $seeds --split dev --samples 4 \
    --out "$runs/table-appworld-smoke"
cells="$runs/table-appworld-smoke/appworld-smoke-base"
for seed in $(seq 0 $((seeds - 1))); do
    out="$runs/appworld-test/base-$seed.json"
    [ -f "$out" ] || timed "test-base-$seed" $skillsd eval --model $base --recipe appworld-smoke --split test --samples 4 \
        --temperature 1 --json "$out" seed="$seed"
    for method in ${methods//,/ }; do
        out="$runs/appworld-test/$method-seed-$seed.json"
        [ -f "$out" ] || timed "test-$method-$seed" $skillsd eval "$cells/$method/seed-$seed" --split test --samples 4 \
            --temperature 1 --json "$out"
    done
done
[ -f "$runs/uplift.json" ] || timed uplift $skillsd skills uplift "$cells/skill-sd/seed-0" --at base --limit 8 --episodes 4 \
    --json "$runs/uplift.json"
[ -f "$runs/speed.json" ] || timed speed .venv/bin/python benchmarks/appworld.py --json "$runs/speed.json"
# A failed test means that an attack succeeds: it is reported, and the study goes on.
timed attacks .venv/bin/python -m pytest tests/envs/test_appworld_attacks.py -k test_attack -p no:cacheprovider \
    --junitxml "$runs/attacks.xml" || [ $? = 1 ]
.venv/bin/python studies/appworld/collect.py "$runs" docs/results/appworld.json
