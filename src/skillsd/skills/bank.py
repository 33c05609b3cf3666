"""The skill bank B(x): each training task's skills, with the rewards of the rollouts that were trained under each.

One SQLite file, and every call is one transaction: if the process is killed, the bank is as it was before or after the
call. The file uses SQLite's rollback journal rather than WAL, so it stays a single file that can be copied, and works
on network file systems. A commit costs about 1 ms on a local disk; `Bank.batch` makes one commit of many calls.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillsd.errors import UserError
from skillsd.files.read import DamagedError
from skillsd.files.write import writing
from skillsd.skills import bank_file, ucb
from skillsd.types import TRAIN_SPLIT, Outcome, Skill, Task

_COLUMNS = (
    "id, env, task, success_analysis, mistake_analysis, golden_workflow, source, iteration, source_reward, "
    "source_outcome, picks, credited, reward_sum"
)
_TYPES = (int, str, str, str, str, str, str, int, float, str, int, int, float)


class HeldOutTaskError(RuntimeError):
    """A held-out task reached the skill bank. This is a bug in the caller: evaluation never uses the bank."""


@dataclass(frozen=True)
class StoredSkill:
    """A skill e with its source and statistics.

    Attributes:
        id: increases with creation and is never reused.
        env, task_id: the task x that it belongs to.
        source: the trajectory it was written from, e.g. ``iteration-12/<task>/3``.
        iteration, source_reward, source_outcome: of that trajectory.
        picks: n(e), the number of times it was picked.
        credited: number of rollouts that were trained with this skill in the teacher's prompt.
        reward_sum: the sum of their rewards.
    """

    id: int
    env: str
    task_id: str
    skill: Skill
    source: str
    iteration: int
    source_reward: float
    source_outcome: Outcome
    picks: int
    credited: int
    reward_sum: float

    @property
    def mean_reward(self) -> float:
        """Mean reward of the rollouts trained under this skill.

        The paper does not define it for a skill without rollouts. Ours: the source trajectory's reward if the skill was
        never picked; 0 if it was picked but never credited (e.g. too long for the teacher's prompt), since it would
        otherwise be picked for ever.
        """
        if self.credited:
            return self.reward_sum / self.credited
        return 0.0 if self.picks else self.source_reward


class Bank:
    """The skills of all training tasks of a run. To be used from one thread.

    Args:
        path: the database file, created if missing; ``":memory:"`` keeps the bank in memory.
        rule: how `peek` chooses, see `skillsd.skills.ucb.picking_rule`. Default: UCB.
        held_out: ids of the tasks of the evaluation splits. They are refused even if the task's split is ``train``.
        max_per_task: maximum number of skills per task. A new skill then replaces the task's skill with the lowest mean
            reward. Skills that were never picked are not removed, so the number may be exceeded by those.

    Raises:
        UserError: if the file is not a skill bank of this version, or holds a held-out task's skills.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rule: ucb.PickingRule = ucb.pick,
        held_out: Iterable[str] = (),
        max_per_task: int | None = None,
    ) -> None:
        if max_per_task is not None and max_per_task < 1:
            raise UserError(f"max_per_task is {max_per_task}; expected 1 or more, or none for no limit")
        self.path = str(path)
        self._rule = rule
        self._held_out = frozenset(held_out)
        self._max_per_task = max_per_task
        self._in_batch = False
        if self.path != ":memory:":
            bank_file.check_header(Path(self.path))
        self._db = bank_file.connect(self.path)
        try:
            bank_file.prepare(self._db, self.path)
            self._check_held_out(self._db, self.path)
        except BaseException:
            self._db.close()
            raise

    def add(self, task: Task, skill: Skill, *, source: str, iteration: int, reward: float, outcome: Outcome) -> int:
        """Store a skill of `task` and return its id. If the task has the same skill already, returns that one's id.

        Raises:
            HeldOutTaskError: for a task that is not a training task.
            ValueError: for an empty skill, or a reward that is not finite.
        """
        self.guard(task)
        if skill.is_empty:
            raise ValueError(f"an empty skill of task {task.id!r} (source {source!r}) cannot be stored")
        if not math.isfinite(reward):
            raise ValueError(f"the reward of {source!r} is {reward}; expected a finite number")
        key = (task.env, task.id, skill.success_analysis, skill.mistake_analysis, skill.golden_workflow)
        with self.batch():
            known = self._db.execute(
                "SELECT id FROM skills WHERE env = ? AND task = ? AND success_analysis = ? "
                "AND mistake_analysis = ? AND golden_workflow = ?",
                key,
            ).fetchone()
            if known is not None:
                return int(known[0])
            self._make_room(task)
            row = self._db.execute(
                "INSERT INTO skills (env, task, success_analysis, mistake_analysis, golden_workflow, source, "
                "iteration, source_reward, source_outcome) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (*key, source, iteration, reward, Outcome(outcome).value),
            ).fetchone()
            return int(row[0])

    def peek(self, task: Task, *, c: float) -> StoredSkill | None:
        """S(x): the skill for the teacher's prompt of `task`; None if there is none, or the picking rule chooses none.

        Nothing is recorded: call `record_pick` once the skill is used.

        Args:
            c: UCB's exploration constant.

        Raises:
            HeldOutTaskError: for a task that is not a training task.
            UserError: if a picking rule of your own raises or returns no index.
            ValueError: if `c` is negative or not finite.
        """
        self.guard(task)
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"UCB's c is {c}; expected a finite number >= 0")
        arms = self._of(task)
        index = ucb.choose(self._rule, arms, c) if arms else None
        return None if index is None else arms[index]

    def record_pick(self, skill_id: int) -> None:
        """n(e) += 1. Does nothing if the skill has been replaced since it was picked."""
        with self.batch():
            self._db.execute("UPDATE skills SET picks = picks + 1 WHERE id = ?", (skill_id,))

    def credit(self, skill_id: int, rewards: Sequence[float]) -> bool:
        """Add the rewards of rollouts that were trained with this skill in the teacher's prompt.

        Returns:
            False if the skill has been replaced since it was picked; nothing is recorded then.

        Raises:
            HeldOutTaskError: if the skill belongs to a held-out task.
            KeyError: for an id that was never assigned.
            ValueError: for rewards that are not finite; nothing is recorded then.
        """
        if not all(math.isfinite(reward) for reward in rewards):
            raise ValueError(f"rewards for skill {skill_id} are {list(rewards)}; expected finite numbers")
        with self.batch():
            found = self._select("WHERE id = ?", skill_id)
            if not found:
                if 1 <= skill_id <= self.created:
                    return False
                raise KeyError(f"no skill has ever had the id {skill_id}; {self.created} were stored")
            self.guard(Task(found[0].task_id, found[0].env, TRAIN_SPLIT))
            self._db.execute(
                "UPDATE skills SET credited = credited + ?, reward_sum = reward_sum + ? WHERE id = ?",
                (len(rewards), math.fsum(rewards), skill_id),
            )
            return True

    def skills(self, task_id: str | None = None) -> list[StoredSkill]:
        """The stored skills of one task, or of all tasks, oldest first."""
        return self._select() if task_id is None else self._select("WHERE task = ?", task_id)

    def counts(self) -> dict[str, int]:
        """For the metrics: tasks with a skill, skills, skills ever picked, picks, credited rollouts."""
        [row] = self._query(
            "SELECT COUNT(DISTINCT env || char(31) || task), COUNT(*), TOTAL(picks > 0), TOTAL(picks), "
            "TOTAL(credited) FROM skills"
        )
        return dict(zip(("tasks", "skills", "picked", "picks", "credited"), map(int, row), strict=True))

    @property
    def created(self) -> int:
        """Number of skills ever stored, replaced ones included."""
        rows = self._query("SELECT seq FROM sqlite_sequence WHERE name = 'skills'")
        return int(rows[0][0]) if rows else 0

    def __len__(self) -> int:
        return int(self._query("SELECT COUNT(*) FROM skills")[0][0])

    def guard(self, task: Task) -> None:
        """Refuse held-out tasks. Every call that takes a task starts with this.

        Raises:
            HeldOutTaskError: unless `task` is a training task.
        """
        if task.split != TRAIN_SPLIT:
            raise HeldOutTaskError(
                f"task {task.id!r} of {task.env!r} is of split {task.split!r}; the skill bank takes "
                f"{TRAIN_SPLIT!r} tasks only. Evaluation must run without the bank."
            )
        if task.id in self._held_out:
            raise HeldOutTaskError(
                f"task {task.id!r} of {task.env!r} has the split {TRAIN_SPLIT!r} but is also in an evaluation split: "
                "the splits overlap. Remove it from one of them."
            )

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make one transaction of the calls inside the block: an exception undoes all of them.

        Raises:
            UserError: if another process keeps the file locked, or it can't be written, e.g. on a full disk.
        """
        if self._in_batch:
            yield
            return
        with bank_file.guarded(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            self._in_batch = True
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._in_batch = False

    def snapshot(self, path: str | Path) -> None:
        """Copy the bank into the file `path`, atomically: written under another name, fsynced, renamed.

        Raises:
            RuntimeError: inside a `batch`.
        """
        if self._in_batch:
            raise RuntimeError("a batch may still be rolled back: end it before the snapshot")
        target = Path(path)
        aside = target.with_name(target.name + ".partial")
        with writing(target):
            aside.unlink(missing_ok=True)
            with closing(bank_file.connect(str(aside))) as copy:
                bank_file.copy(self._db, copy, self.path)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.replace(target)

    def restore(self, path: str | Path) -> None:
        """Replace the bank's whole content by a snapshot's; on an error the bank stays as it was.

        Raises:
            UserError: if `path` is not a bank of this version, or holds skills of held-out tasks.
            RuntimeError: inside a `batch`.
        """
        if self._in_batch:
            raise RuntimeError("a batch may still be rolled back: end it before the restore")
        if not Path(path).is_file():
            raise DamagedError(Path(path), "is missing", "expected a checkpoint's skills.sqlite")
        with closing(bank_file.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as snapshot:
            bank_file.check(snapshot, str(path))
            self._check_held_out(snapshot, str(path))
            bank_file.copy(snapshot, self._db, self.path)

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._db.close()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _of(self, task: Task) -> list[StoredSkill]:
        return self._select("WHERE env = ? AND task = ?", task.env, task.id)

    def _select(self, where: str = "", *values: object) -> list[StoredSkill]:
        rows = self._query(f"SELECT {_COLUMNS} FROM skills {where} ORDER BY id", *values)
        return [self._stored(row) for row in rows]

    def _stored(self, row: Sequence[Any]) -> StoredSkill:
        # SQLite's columns take values of any type.
        if tuple(map(type, row)) != _TYPES or row[9] not in set(Outcome):
            raise DamagedError(Path(self.path), f"is damaged (the skill {row[0]!r})", bank_file.RESTORE)
        id, env, task, success, mistakes, workflow, source, iteration, reward, outcome, *counts = row
        skill = Skill(success, mistakes, workflow)
        return StoredSkill(id, env, task, skill, source, iteration, reward, Outcome(outcome), *counts)

    def _query(self, sql: str, *values: object) -> list[Any]:
        with bank_file.guarded(self.path):
            return self._db.execute(sql, values).fetchall()

    def _make_room(self, task: Task) -> None:
        if self._max_per_task is None:
            return
        stored = self._of(task)
        # By mean reward, without an exploration bonus; the oldest goes first among equals.
        tried = sorted((s for s in stored if s.picks), key=lambda s: (s.mean_reward, s.id))
        surplus = max(0, len(stored) + 1 - self._max_per_task)
        for leaving in tried[:surplus]:
            self._db.execute("DELETE FROM skills WHERE id = ?", (leaving.id,))

    def _check_held_out(self, db: sqlite3.Connection, path: str) -> None:
        with bank_file.guarded(path):
            stored = {task for (task,) in db.execute("SELECT DISTINCT task FROM skills")}
        if leaked := sorted(stored & self._held_out):
            raise UserError(
                f"the skill bank {path} holds skills of {len(leaked)} evaluation tasks, e.g. {leaked[0]!r}. "
                "Training on it would invalidate the evaluation: give a bank made from this environment's training "
                "tasks."
            )
