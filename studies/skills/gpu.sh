#!/usr/bin/env bash
# A real language model on the rulebook in English, on one GPU: warm start, then GRPO, self-imitation, a frozen teacher and
# a synchronised one that is kept reading, with reward for success only. Works without an installation of skillsd.
#   studies/skills/gpu.sh OUT [KEY=VALUE ...]
# A dry run on a CPU, minutes long, that shows that it works and nothing else:
#   STEPS=2 EPISODES=32 LIMIT=4 studies/skills/gpu.sh OUT model.device=cpu rollout.tasks_per_iteration=4 rollout.group_size=4
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?"give a folder for the base model and the runs"}
shift
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH=src:studies/skills

device=()
for setting in "$@"; do [[ $setting == model.* ]] && device+=("$setting"); done
if [ ! -f "$out/base/warm_start.json" ]; then
    $python -m skillsd sft rulebook-smollm2-base "warm_start.steps=${STEPS:-300}" ${LIMIT:+"check.limit=$LIMIT"} \
        ${device[@]+"${device[@]}"} --out "$out/base"
fi
$python -m skillsd table rulebook-smollm2 "$@" evaluation.limit="${LIMIT:-64}" log.tensorboard=false reading.every=4 \
    --models "$out/base" --variants studies/skills/variants.yaml --methods grpo,grpo-imitation,skill-sd-frozen,skill-sd,practice \
    --episodes "${EPISODES:-6144}" ${LIMIT:+--limit "$LIMIT"} --out "$out/table"
