"""Play an environment in the terminal (`skillsd envs play`): the quickest way to see what the model sees."""

from __future__ import annotations

import asyncio
import builtins
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from skillsd.envs.base import Step, TaskSet
from skillsd.envs.checked import checked
from skillsd.errors import UserError, unknown_name
from skillsd.types import Message, Task


@dataclass(frozen=True)
class Played:
    """Result of a game: turns taken, the last reward, and full success."""

    turns: int
    reward: float
    success: bool


def find_task(task_set: TaskSet, split: str, index_or_id: int | str) -> Task:
    """A task by its id or its index in the split (from 0; negative indices count from the end).

    Raises:
        UserError: if the task does not exist.
    """
    tasks = task_set.tasks(split)
    by_id = {task.id: task for task in tasks}
    if isinstance(index_or_id, str) and index_or_id in by_id:
        return by_id[index_or_id]
    try:
        index = int(index_or_id)
    except ValueError:
        raise unknown_name(f"task of split {split!r}", str(index_or_id), by_id) from None
    if not -len(tasks) <= index < len(tasks):
        raise UserError(f"split {split!r} has {len(tasks)} tasks, 0 to {len(tasks) - 1}; got {index}")
    return tasks[index]


def play(
    task_set: TaskSet,
    split: str,
    index_or_id: int | str,
    *,
    input: Callable[[str], str] = builtins.input,
    print: Callable[[str], None] = builtins.print,
    seed: int = 0,
) -> Played:
    """Play one task until it is done or the player quits.

    Each input line is an action, as a model would write it, or a key of ``task_set.shortcuts`` (if defined). ``q``
    quits, ``r`` restarts and ``?`` shows the keys, unless a shortcut uses the same key; end of input and Ctrl-C also
    quit. ``info["board"]``, if present, is printed.

    Raises:
        UserError: if the task does not exist.
    """
    task_set = checked(task_set)
    task = find_task(task_set, split, index_or_id)
    return asyncio.run(_play(task_set, task, input, print, seed))


async def _play(
    task_set: TaskSet,
    task: Task,
    read: Callable[[str], str],
    show: Callable[[str], None],
    seed: int,
) -> Played:
    shortcuts: Mapping[str, str] = getattr(task_set, "shortcuts", {})
    keys = ", ".join(f"{key} {action}" for key, action in shortcuts.items())
    usage = f"{keys + '; or ' if keys else ''}type an action. q quit, r restart, ? help"
    environment = task_set.make()
    result = Played(0, 0.0, False)
    try:
        show(f"Task {task.id}, difficulty {task.difficulty:g}. {usage}.")
        for tool in task_set.tools:
            show(f"Tool {tool.name}: {tool.description} Arguments: {json.dumps(tool.parameters)}")
        if task_set.tools:
            show('An action is JSON: {"calls": [{"name": "...", "arguments": {...}}]}')
        await _start(environment.reset(task, seed), show)
        while True:
            line = read("> ").strip()
            command = line.lower()
            if command in shortcuts:
                line = shortcuts[command]
            elif command == "?":
                show(usage)
                continue
            elif command == "q":
                show("Bye.")
                return result
            elif command == "r":
                result = Played(0, 0.0, False)
                await _start(environment.reset(task, seed), show)
                continue
            step = await environment.step(line)
            result = Played(result.turns + 1, step.reward, step.success)
            _show_step(step, show)
            if step.done:
                how = "Solved" if step.success else "Not solved"
                show(f"{how} in {result.turns} turns, reward {step.reward:.2f}.")
                return result
    except (EOFError, KeyboardInterrupt):
        show("\nBye.")
        return result
    finally:
        await environment.close()


async def _start(reset: Awaitable[tuple[Message, ...]], show: Callable[[str], None]) -> None:
    for message in await reset:
        show(message.content)


def _show_step(step: Step, show: Callable[[str], None]) -> None:
    board = step.info.get("board")
    if board:
        show(str(board))
    show(step.observation)
