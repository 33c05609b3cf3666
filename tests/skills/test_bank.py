"""The skill bank: picks and credits, held-out tasks, and a file that survives being killed."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from skillsd.errors import UserError
from skillsd.files.read import DamagedError
from skillsd.files.write import WriteFailedError
from skillsd.skills import bank_file, ucb
from skillsd.skills.bank import Bank, HeldOutTaskError, StoredSkill
from skillsd.types import Outcome, Skill, Task


@pytest.fixture
def bank() -> Iterator[Bank]:
    with Bank(":memory:") as bank:
        yield bank


def put(bank: Bank, task: Task, text: str = "a", reward: float = 1.0) -> int:
    return bank.add(
        task,
        Skill("", "", text),
        source=f"iteration-3/{task.id}/0",
        iteration=3,
        reward=reward,
        outcome=Outcome.SOLVED,
    )


def pick(bank: Bank, task: Task, c: float = 1.0) -> StoredSkill | None:
    """Choose and record, as in training."""
    chosen = bank.peek(task, c=c)
    if chosen is None:
        return None
    bank.record_pick(chosen.id)
    return next(skill for skill in bank.skills() if skill.id == chosen.id)


def test_round_trip(bank: Bank, task: Task) -> None:
    skill = Skill("müde\n\tΩ", 'it\'s "quoted" \x00 {x}', "'; DROP TABLE skills; --")
    id = bank.add(task, skill, source="iteration-3/t/1", iteration=3, reward=0.5, outcome=Outcome.FAILED)
    (stored,) = bank.skills(task.id)
    assert dataclasses.asdict(stored) == {
        "id": id, "env": "maze", "task_id": "level-1", "skill": dataclasses.asdict(skill),
        "source": "iteration-3/t/1", "iteration": 3, "source_reward": 0.5, "source_outcome": Outcome.FAILED,
        "picks": 0, "credited": 0, "reward_sum": 0.0,
    }  # fmt: skip
    assert bank.skills("another") == []


def test_empty_bank_has_no_skill(bank: Bank, task: Task) -> None:
    assert pick(bank, task) is None
    assert bank.counts() == {"tasks": 0, "skills": 0, "picked": 0, "picks": 0, "credited": 0}


def test_peek_records_nothing(bank: Bank, task: Task) -> None:
    put(bank, task)
    assert bank.peek(task, c=1.0) == bank.skills()[0]
    picked = pick(bank, task)
    assert picked is not None
    assert picked.picks == 1
    assert bank.skills() == [picked]


def test_ucb_over_a_bank_computed_by_hand(bank: Bank, task: Task) -> None:
    poor, good = put(bank, task, "poor"), put(bank, task, "good")

    def visit(rewards: list[float]) -> int:
        picked = pick(bank, task, 0.5)
        assert picked is not None
        bank.credit(picked.id, rewards)
        return picked.id

    assert visit([0.5, 1.0]) == good  # both unpicked: the newest first
    assert visit([0.0, 0.5]) == poor  # the only unpicked one
    # N = 2, n = 1 each: the means 0.75 and 0.25 decide. N = 3: 0.75 + 0.5 sqrt(ln 3 / 2) = 1.121 against
    # 0.25 + 0.5 sqrt(ln 3) = 0.774; and so on until the bonus of the poor one, picked once, is large enough.
    visits = [visit([0.75, 0.75]) for _ in range(12)]
    assert visits[:2] == [good, good]
    first_return = visits.index(poor)
    total = first_return + 2
    bonus = [0.75 + 0.5 * math.sqrt(math.log(total) / (total - 1)), 0.25 + 0.5 * math.sqrt(math.log(total))]
    assert bonus[0] < bonus[1]
    total -= 1
    bonus = [0.75 + 0.5 * math.sqrt(math.log(total) / (total - 1)), 0.25 + 0.5 * math.sqrt(math.log(total))]
    assert bonus[0] > bonus[1]


def test_mean_reward_is_over_credited_rollouts(bank: Bank, task: Task) -> None:
    id = put(bank, task, reward=1.0)
    assert bank.skills()[0].mean_reward == 1.0  # nothing credited yet: the source's reward
    bank.credit(id, [0.0, 0.5])
    bank.credit(id, [0.25])
    bank.credit(id, [])
    (stored,) = bank.skills()
    assert (stored.mean_reward, stored.credited) == (0.25, 3)


def test_skills_are_kept_by_environment_and_task(bank: Bank, task: Task) -> None:
    other = dataclasses.replace(task, id="level-2")
    same_id = dataclasses.replace(task, env="sokoban")
    ids = {put(bank, t) for t in (task, other, same_id)}
    assert len(ids) == 3
    for t in (task, other, same_id):
        picked = pick(bank, t)
        assert picked is not None
        assert (picked.env, picked.task_id) == (t.env, t.id)
    assert bank.counts()["tasks"] == 3


def test_same_skill_is_stored_once_per_task(bank: Bank, task: Task) -> None:
    id = put(bank, task, reward=1.0)
    pick(bank, task)
    assert put(bank, task, reward=0.0) == id
    assert len(bank) == bank.created == 1
    assert (bank.skills()[0].source_reward, bank.skills()[0].picks) == (1.0, 1)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_non_finite_numbers_are_refused(bank: Bank, task: Task, reward: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        put(bank, task, reward=reward)
    id = put(bank, task)
    with pytest.raises(ValueError, match="finite"):
        bank.credit(id, [0.5, reward])
    assert bank.skills()[0].credited == 0
    with pytest.raises(ValueError, match="c is"):
        pick(bank, task, reward)


def test_empty_skill_is_refused(bank: Bank, task: Task) -> None:
    with pytest.raises(ValueError, match="empty skill"):
        put(bank, task, "")


def test_credit_of_an_unknown_id_is_an_error(bank: Bank) -> None:
    with pytest.raises(KeyError, match="no skill has ever had the id 1"):
        bank.credit(1, [1.0])


class TestSplitGuard:
    @pytest.mark.parametrize("split", ["test", "tune", "Train", ""])
    def test_only_training_tasks_are_accepted(self, bank: Bank, task: Task, split: str) -> None:
        put(bank, task)
        before = bank.skills()
        held_out = dataclasses.replace(task, split=split)
        for call in (put, lambda b, t: b.peek(t, c=1.0)):
            with pytest.raises(HeldOutTaskError, match="level-1"):
                call(bank, held_out)
        assert bank.skills() == before

    def test_held_out_id_is_refused_even_with_the_split_train(self, task: Task) -> None:
        with Bank(":memory:", held_out=[task.id]) as bank:
            for call in (put, pick):
                with pytest.raises(HeldOutTaskError, match="splits overlap"):
                    call(bank, task)
            assert len(bank) == 0

    def test_credit_is_guarded(self, bank: Bank, task: Task) -> None:
        id = put(bank, task)
        bank._held_out = frozenset([task.id])  # no public call leads here: opening such a bank is refused
        with pytest.raises(HeldOutTaskError):
            bank.credit(id, [1.0])
        assert bank.skills()[0].credited == 0

    def test_bank_with_skills_of_evaluation_tasks_is_refused(self, tmp_path: Path, task: Task) -> None:
        with Bank(tmp_path / "skills.sqlite") as bank:
            put(bank, task)
        with pytest.raises(UserError, match=r"evaluation tasks, e\.g\. 'level-1'"):
            Bank(tmp_path / "skills.sqlite", held_out=[task.id])
        with Bank(":memory:", held_out=[task.id]) as bank:
            with pytest.raises(UserError, match="evaluation tasks"):
                bank.restore(tmp_path / "skills.sqlite")
            assert len(bank) == 0


class TestCap:
    def test_tried_skill_with_the_lowest_mean_is_replaced(self, task: Task) -> None:
        with Bank(":memory:", max_per_task=2) as bank:
            a, b = put(bank, task, "a"), put(bank, task, "b")
            for id, reward in ((b, 0.1), (a, 0.9)):
                picked = pick(bank, task)
                assert picked is not None
                assert picked.id == id
                bank.credit(id, [reward])
            c = put(bank, task, "c")
            assert [stored.id for stored in bank.skills()] == [a, c]
            assert bank.credit(b, [1.0]) is False
            assert put(bank, task, "b") not in (a, b, c)  # ids are never reused
            assert bank.created == 4

    def test_untried_skill_is_never_replaced(self, task: Task) -> None:
        with Bank(":memory:", max_per_task=1) as bank:
            for text in "abc":
                put(bank, task, text)
            assert len(bank) == 3
            pick(bank, task)
            put(bank, task, "d")
            assert [stored.skill.golden_workflow for stored in bank.skills()] == ["a", "b", "d"]

    def test_cap_is_per_task(self, task: Task) -> None:
        with Bank(":memory:", max_per_task=1) as bank:
            put(bank, task)
            pick(bank, task)
            put(bank, dataclasses.replace(task, id="level-2"))
            assert len(bank) == 2

    def test_cap_of_zero_is_refused(self) -> None:
        with pytest.raises(UserError, match="max_per_task is 0"):
            Bank(":memory:", max_per_task=0)


def test_picking_rule_decides(task: Task) -> None:
    with Bank(":memory:", rule=ucb.picking_rule("last")) as bank:
        put(bank, task, "a")
        last = put(bank, task, "b")
        for _ in range(3):
            picked = pick(bank, task)
            assert picked is not None
            assert picked.id == last
    with Bank(":memory:", rule=lambda arms, c: None) as bank:
        put(bank, task)
        assert pick(bank, task) is None
        assert bank.counts()["picks"] == 0


def test_random_picks_are_the_same_after_a_restore(tmp_path: Path, task: Task) -> None:
    def picks(bank: Bank, times: int) -> list[int]:
        return [picked.id for _ in range(times) if (picked := pick(bank, task))]

    with Bank(":memory:", rule=ucb.picking_rule("random", seed=5)) as bank:
        for text in "abcdef":
            put(bank, task, text)
        picks(bank, 7)
        bank.snapshot(tmp_path / "snapshot")
        expected = picks(bank, 20)
    with Bank(":memory:", rule=ucb.picking_rule("random", seed=5)) as bank:
        bank.restore(tmp_path / "snapshot")
        assert picks(bank, 20) == expected


class TestFile:
    def test_bank_is_one_file_and_can_be_reopened(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank:
            put(bank, task)
            pick(bank, task)
            expected = bank.skills()
        assert os.listdir(tmp_path) == ["skills.sqlite"]
        with Bank(path) as bank:
            assert bank.skills() == expected

    def test_second_reader_is_allowed(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank, Bank(path) as viewer:
            put(bank, task)
            assert len(viewer) == 1

    def test_second_writer_is_refused(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank, Bank(path) as other:
            other._db.execute("PRAGMA busy_timeout = 10")
            with bank.batch():
                with pytest.raises(UserError, match="another process"):
                    put(other, task)
                put(bank, task)
            put(other, task)

    def test_batch_is_atomic(self, bank: Bank, task: Task) -> None:
        def half_way() -> None:
            with bank.batch():
                put(bank, task, "a")
                raise RuntimeError("half way")

        with pytest.raises(RuntimeError, match="half way"):
            half_way()
        assert len(bank) == 0
        with bank.batch():
            put(bank, task, "a")
            pick(bank, task)
        assert bank.counts()["picks"] == 1

    @pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 50, b"x"])
    def test_other_file_is_refused_and_unchanged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"notes\.txt.*not a database"):
            Bank(path)
        assert path.read_bytes() == content

    def test_other_database_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other.sqlite"
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE skills (id)")
        db.commit()
        db.close()
        with pytest.raises(UserError, match="not a skill bank"):
            Bank(path)

    def test_other_schema_version_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "skills.sqlite"
        Bank(path).close()
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 99")
        db.close()
        with pytest.raises(UserError, match="schema version 99, this skillsd reads 1"):
            Bank(path)

    def test_damaged_file_is_refused(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank, bank.batch():
            for i in range(300):
                put(bank, task, f"{i} " * 30)
        content = bytearray(path.read_bytes())
        content[4096 * 3 : 4096 * 6] = os.urandom(4096 * 3)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged|malformed"):
            Bank(path)

    def test_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot open the skill bank"):
            Bank(tmp_path)

    def test_missing_parent_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="Does its folder exist"):
            Bank(tmp_path / "nowhere" / "skills.sqlite")

    def test_use_from_another_thread_is_refused(self, bank: Bank) -> None:
        caught: list[Exception] = []

        def use() -> None:
            try:
                len(bank)
            except sqlite3.ProgrammingError as error:
                caught.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert caught


class TestLocked:
    """Another connection with an open transaction: a database viewer, a backup, `sqlite3` in a shell."""

    @pytest.fixture(autouse=True)
    def short_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bank_file, "WAIT_SECONDS", 0.2)

    @staticmethod
    @contextmanager
    def another(path: Path, begin: str) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
            db.execute(begin)
            db.execute("SELECT * FROM skills").fetchall()
            yield db

    def test_a_commit_beside_a_reader(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank:
            put(bank, task, "a")
            with self.another(path, "BEGIN"), pytest.raises(UserError, match="another process has locked"):
                put(bank, task, "b")
            assert len(bank) == 1
            assert put(bank, task, "b") == 2

    def test_a_commit_waits(self, tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bank_file, "WAIT_SECONDS", 30.0)
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank, self.another(path, "BEGIN") as db:
            timer = threading.Timer(0.3, db.rollback)
            timer.start()
            put(bank, task, "a")
            timer.join()
            assert len(bank) == 1

    def test_everything_beside_a_writer(self, tmp_path: Path, task: Task) -> None:
        path, copy = tmp_path / "skills.sqlite", tmp_path / "copy.sqlite"
        with Bank(path) as bank:
            put(bank, task)
            bank.snapshot(copy)
            before = copy.read_bytes()
            with self.another(path, "BEGIN EXCLUSIVE"):
                for call in (
                    bank.skills,
                    bank.counts,
                    bank.__len__,
                    lambda: bank.peek(task, c=1.0),
                    lambda: bank.record_pick(1),
                    lambda: bank.snapshot(copy),
                    lambda: bank.restore(copy),
                    lambda: Bank(path),
                ):
                    with pytest.raises(UserError, match="another process has locked"):
                        call()
            assert copy.read_bytes() == before
            assert [skill.picks for skill in bank.skills()] == [0]

    def test_a_restore_beside_a_reader(self, tmp_path: Path, task: Task) -> None:
        path = tmp_path / "skills.sqlite"
        with Bank(path) as bank:
            bank.snapshot(tmp_path / "empty.sqlite")
            put(bank, task)
            with self.another(path, "BEGIN"), pytest.raises(UserError, match="another process has locked"):
                bank.restore(tmp_path / "empty.sqlite")
            assert len(bank) == 1


def test_a_full_disk_undoes_the_call(tmp_path: Path, task: Task) -> None:
    with Bank(tmp_path / "skills.sqlite") as bank:
        put(bank, task, "a")
        bank._db.execute("PRAGMA max_page_count = 6")
        with pytest.raises(WriteFailedError, match=r"full.*make room there"):
            put(bank, task, "b" * 100_000)
        assert len(bank) == 1
        bank._db.execute("PRAGMA max_page_count = 1000000")
        put(bank, task, "b" * 100_000)


def test_a_snapshot_on_a_full_disk_keeps_the_one_before(tmp_path: Path, bank: Bank, task: Task) -> None:
    bank.snapshot(tmp_path / "copy.sqlite")
    put(bank, task, "a" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(WriteFailedError):
            bank.snapshot(tmp_path / "copy.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with Bank(tmp_path / "copy.sqlite") as copy:
        assert len(copy) == 0


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_bank(cut: float, tmp_path: Path, task: Task) -> None:
    path = tmp_path / "skills.sqlite"
    with Bank(path) as bank, bank.batch():
        for i in range(300):
            put(bank, task, f"{i} " * 30)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DamagedError, match=r"skills\.sqlite' is damaged"):
        Bank(path)
    with Bank(":memory:") as other, pytest.raises(DamagedError):
        other.restore(path)


@pytest.mark.parametrize(
    "change", ["source_outcome = 'won'", "golden_workflow = x'ff'", "reward_sum = 'much'", "task = CAST(x'ff' AS TEXT)"]
)
def test_values_of_another_type(change: str, tmp_path: Path, task: Task) -> None:
    path = tmp_path / "skills.sqlite"
    with Bank(path) as bank:
        put(bank, task)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"UPDATE skills SET {change}")
        db.commit()
    with pytest.raises(DamagedError, match="is damaged"), Bank(path) as bank:
        bank.skills()


class TestSnapshot:
    def test_restore_is_exact(self, tmp_path: Path, task: Task) -> None:
        with Bank(tmp_path / "live.sqlite", max_per_task=1) as bank:
            put(bank, task, "a")
            pick(bank, task)
            put(bank, task, "b")
            expected = bank.skills()
            bank.snapshot(tmp_path / "snapshot.sqlite")
            put(bank, task, "c")
            pick(bank, task)
            bank.restore(tmp_path / "snapshot.sqlite")
            assert bank.skills() == expected
            assert bank.created == 2
            assert put(bank, task, "d") == 3  # the id sequence is restored too
        assert sorted(os.listdir(tmp_path)) == ["live.sqlite", "snapshot.sqlite"]

    def test_snapshot_replaces_an_older_one(self, tmp_path: Path, bank: Bank, task: Task) -> None:
        path = tmp_path / "100% näive #1?.sqlite"
        (tmp_path / (path.name + ".partial")).write_text("left by a killed process")
        bank.snapshot(path)
        put(bank, task)
        bank.snapshot(path)
        with Bank(":memory:") as other:
            other.restore(path)
            assert other.skills() == bank.skills()

    def test_failed_restore_changes_nothing(self, tmp_path: Path, bank: Bank, task: Task) -> None:
        put(bank, task)
        (tmp_path / "text").write_text("text" * 100)
        (tmp_path / "empty").touch()
        for name, message in [
            ("text", "not a database"),
            ("empty", "not a skill"),
            ("none", "is missing"),
        ]:
            with pytest.raises(UserError, match=message):
                bank.restore(tmp_path / name)
        assert len(bank) == 1
        assert not (tmp_path / "none").exists()

    def test_snapshot_and_restore_are_refused_inside_a_batch(self, tmp_path: Path, bank: Bank) -> None:
        with bank.batch():
            with pytest.raises(RuntimeError, match="end it before"):
                bank.snapshot(tmp_path / "s")
            with pytest.raises(RuntimeError, match="end it before"):
                bank.restore(tmp_path / "s")


WRITER = """
import os, signal, sys
from skillsd.skills.bank import Bank
from skillsd.types import Outcome, Skill, Task
task = Task("t", "maze", "train")
def add(bank, text):
    bank.add(task, Skill("", "", text), source="s", iteration=0, reward=1.0, outcome=Outcome.SOLVED)
with Bank(sys.argv[1]) as bank:
    for i in range(int(sys.argv[2])):
        with bank.batch():  # a unit: three skills, one pick and its credit
            for j in range(3):
                add(bank, f"{i} {j} " + "x" * 5000)
            chosen = bank.peek(task, c=1.0)
            bank.record_pick(chosen.id)
            bank.credit(chosen.id, [1.0])
        print(i, flush=True)
    with bank.batch():
        for i in range(600):  # more than SQLite's page cache holds, so part of it reaches the file
            add(bank, f"lost {i} " + "x" * 5000)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def written_by(path: Path, units: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(units)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check_whole_units(path: Path, reported: list[int], task: Task) -> None:
    with Bank(path) as bank:
        counts = bank.counts()
        assert counts["skills"] == 3 * counts["picks"] == 3 * counts["credited"]
        assert counts["picks"] >= reported[-1] + 1  # committed units are kept
        put(bank, task)


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_killed_writer_leaves_whole_transactions(tmp_path: Path, delay: float, task: Task) -> None:
    path = tmp_path / "skills.sqlite"
    with written_by(path, 10**9) as writer:
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(10)]
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        reported += [int(line) for line in writer.stdout.read().split()]
    check_whole_units(path, reported, task)


def test_writer_killed_inside_a_batch_leaves_nothing_of_it(tmp_path: Path, task: Task) -> None:
    path = tmp_path / "skills.sqlite"
    with written_by(path, 2) as writer:
        assert writer.stdout is not None
        reported = [int(line) for line in writer.stdout.read().split()]
    assert writer.returncode == -signal.SIGKILL
    assert path.stat().st_size > 1_000_000  # uncommitted skills had reached the file
    assert (tmp_path / "skills.sqlite-journal").exists()
    check_whole_units(path, reported, task)
    with Bank(path) as bank:
        assert not any("lost" in stored.skill.golden_workflow for stored in bank.skills())
