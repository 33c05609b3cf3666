"""Train, evaluate and read a run from Python; the same works in a notebook.

python examples/train_from_python.py [FOLDER]      # a short run of the tiny agent, a minute on one CPU core
"""

import sys
import tempfile
from pathlib import Path

import skillsd


def main(folder: Path, *overrides: str) -> skillsd.OpenRun:
    """Train into `folder`; further settings over the recipe's as ``key=value``."""
    config = skillsd.load_recipe(
        "sokoban-nano",
        "training.iterations=8",
        "curriculum.tasks=32",  # each task comes again, so that its skills teach
        "evaluation.limit=32",
        *overrides,
        method="skill-sd",
        seed=1,
    )

    def on_record(kind, record):
        if kind == "iteration":
            print(f"iteration {record['iteration']}: reward {record['rollout/reward']:.2f}")
        else:
            print(f"held-out accuracy {record['eval/accuracy']:.2f} after {record['episodes']:.0f} episodes")

    run = skillsd.train(config, out=folder, on_record=on_record)

    # What the run left, as plain records: pandas.DataFrame(run.metrics) makes a table of them.
    taught = [record["batch/groups_with_teacher"] for record in run.metrics]
    print(f"groups with a teacher, by iteration: {taught}")
    solved = sum(trajectory.success for trajectory in run.trajectories(1))
    print(f"the first iteration's trajectories: {solved} solved; the bank holds {len(run.skills)} skills")

    result = skillsd.evaluate(run, split="test", limit=32)
    low, high = result.interval
    print(f"accuracy on {result.tasks} test tasks: {result.accuracy:.2f} [{low:.2f}, {high:.2f}]")
    print(f"weights for transformers: {run.model_folder()}")
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "run")
