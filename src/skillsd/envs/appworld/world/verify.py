"""Plays every task and verifies its evaluation: ``python verify.py --root ROOT``.

Run by AppWorld's Python. Checks for each task, each in its own process:

- the reference solution, turn by turn, passes every test;
- a no-op fails, and passes none of the tests that the dense reward counts (label ``no_op_fail``);
- the solution with a wrong answer fails, if the task asks for an answer;
- the solution with any of the scenario's harmful side effects fails, as does deleting the supervisor's account.

Also checks, for the whole world, that no instruction and no reference solution of one split is in another.

Exits with status 1 and lists the tasks that fail a check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder that contains data/")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--split", help="check only the tasks of this split")
    parser.add_argument("--tasks", nargs="+", help="check only these tasks")
    parser.add_argument("--json", type=Path, help="write the findings to this file, one object per task")
    arguments = parser.parse_args()
    sys.path.append(str(_HERE.parent))
    root = arguments.root.resolve()
    index = json.loads((root / "data" / "skillsd.json").read_text())
    ids = arguments.tasks or (index["splits"][arguments.split] if arguments.split else list(index["tasks"]))
    shared = shared_texts(root, index)
    findings = verify(root, ids, arguments.workers)
    if arguments.json:
        arguments.json.write_text(json.dumps(findings, indent=1) + "\n")
    print_table(index, findings)
    failed = {task: finding["failed"] for task, finding in findings.items() if finding["failed"]}
    for task, reasons in failed.items():
        print(f"{task}: {'; '.join(reasons)}")
    print(f"{len(findings) - len(failed)} of {len(findings)} tasks pass all checks")
    print("\n".join(shared) or "no instruction and no reference solution is in two splits")
    sys.exit(1 if failed or shared else 0)


def shared_texts(root: Path, index: dict[str, Any]) -> list[str]:
    """What the splits in the built data share; see `tasks.problems_of_splits`."""
    from world.tasks import problems_of_splits

    def read(task: str, name: str) -> Any:
        return json.loads((root / "data" / "tasks" / task / name).read_text())

    return problems_of_splits(
        (task, split, read(task, "specs.json")["instruction"], read(task, "ground_truth/solution.json"))
        for split, ids in index["splits"].items()
        for task in ids
    )


def verify(root: Path, ids: list[str], workers: int) -> dict[str, dict[str, Any]]:
    """Findings for each task: sizes, and under "failed" the failed checks."""
    from world.episode import fork_each, play, preload

    os.environ["APPWORLD_ROOT"] = str(root)
    preload()
    plans = {(task, check): blocks for task in ids for check, blocks in checks_of(root, task).items()}
    jobs = [(key, lambda key=key, blocks=blocks: play(key[0], blocks)) for key, blocks in plans.items()]
    findings: dict[str, dict[str, Any]] = {task: {"failed": []} for task in ids}
    for number, ((task, check), result) in enumerate(fork_each(jobs, workers), 1):
        finding = findings[task]
        finding["failed"] += failures(check, result)
        if check == "solution" and "error" not in result:
            finding["turns"] = len(result["outputs"])
            finding["tests"] = result["num_tests"]
            finding["code_characters"] = max(len(block) for block in plans[task, check])
            finding["output_characters"] = max(len(output) for output in result["outputs"])
        if number % 100 == 0:
            print(f"{number} of {len(jobs)} episodes", flush=True)
    return findings


def checks_of(root: Path, task: str) -> dict[str, list[str]]:
    """The episodes to play for a task: check name -> code blocks to run."""
    from world.scenarios import SCENARIOS
    from world.scenarios.base import FINISH, FINISH_WITH_ANSWER

    truth = root / "data" / "tasks" / task / "ground_truth"
    *work, finish = [turn["code"] for turn in json.loads((truth / "solution.json").read_text())]
    checks = {"solution": [*work, finish], "no-op": [FINISH], "silence": ["pass"]}
    if finish == FINISH_WITH_ANSWER:
        answer = wrong_answer(json.loads((truth / "answer.json").read_text()))
        checks["wrong answer"] = [*work, f"apis.supervisor.complete_task(answer={answer!r})"]
        checks["no answer"] = [*work, FINISH]
    else:
        checks["needless answer"] = [*work, "apis.supervisor.complete_task(answer='done')"]
    scenario = SCENARIOS[task.split("_")[0]]
    for number, harm in enumerate(scenario.harms, 1):
        checks[f"side effect {number}"] = [*work, harm, finish]
    # The evaluation must handle this without an error.
    gone = f"apis.{scenario.apps[-1]}.delete_account(access_token=token)"
    checks["account deleted"] = [*work, gone, finish]
    return checks


def wrong_answer(answer: Any) -> Any:
    """A wrong answer close to the right one."""
    if isinstance(answer, int | float):
        return answer + 1
    return str(int(answer) + 1) if str(answer).isdigit() else f"{answer} or not"


def failures(check: str, result: dict[str, Any]) -> list[str]:
    """The reasons why an episode fails its check."""
    if "error" in result:
        return [f"{check}: {result['error'].strip().splitlines()[-1]}"]
    reasons = []
    failed = [output for output in result["outputs"] if output.startswith("Execution failed")]
    if failed:
        reasons.append(f"{check}: {failed[0].strip().splitlines()[-1]}")
    if check == "solution":
        if not (result["success"] and result["completed"]):
            missing = [failure["requirement"] for failure in result["failures"]]
            reasons.append(f"the solution does not pass: {missing}")
        return reasons
    if result["success"]:
        reasons.append(f"{check}: succeeds")
    if check in ("no-op", "silence"):
        earned = [test["requirement"] for test in result["passes"] if test["label"] == "no_op_fail"]
        if earned:
            reasons.append(f"{check}: earns reward for {earned}")
    return reasons


def print_table(index: dict[str, Any], findings: dict[str, dict[str, Any]]) -> None:
    """Print one line per scenario, with the largest sizes among its tasks."""
    by_scenario: dict[str, list[str]] = defaultdict(list)
    for task in findings:
        by_scenario[index["tasks"][task]["scenario"]].append(task)
    header = ("scenario", "difficulty", "tasks", "passed", "tests", "turns", "code", "output", "apps")
    rows = []
    for scenario, tasks in by_scenario.items():
        entry, passed = index["tasks"][tasks[0]], sum(not findings[task]["failed"] for task in tasks)
        names = ("tests", "turns", "code_characters", "output_characters")
        sizes = [max(findings[task].get(name, 0) for task in tasks) for name in names]
        rows.append((scenario, entry["difficulty"], len(tasks), passed, *sizes, ", ".join(entry["apps"])))
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
