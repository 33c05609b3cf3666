"""AppWorld without its engine: root folders, prompts, parsing, skills and demonstrations, on invented tasks."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import sqlite3
import string
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skillsd.envs import load
from skillsd.envs.appworld import demonstrations, paths, prompt
from skillsd.envs.appworld.data import APPS, SolutionTurn, World, scenario_of
from skillsd.envs.appworld.demonstrations import demonstrate, recording_path
from skillsd.envs.appworld.prompt import STYLES, Code, Style, Unusable, code_of, first_prompt, observation, turn_text
from skillsd.envs.appworld.summarise import MAX_SHORT_CHARS, summarise_turns
from skillsd.envs.base import Step
from skillsd.errors import UserError
from skillsd.types import Demonstration, Outcome, Skill, Task, Trajectory, Turn

SUPERVISOR = {"first_name": "Ann", "last_name": "Lee", "email": "ann@mail.com", "phone_number": "5551234567"}
SOLUTION = [
    {"thought": "Log in.", "code": "token = apis.spotify.login(username='ann@mail.com', password='pw')"},
    {"thought": "Done.", "code": "apis.supervisor.complete_task(answer=3)"},
]


def write_task(root: Path, task_id: str, difficulty: int | None = 1, **changes: object) -> None:
    folder = root / "data" / "tasks" / task_id
    truth = folder / "ground_truth"
    truth.mkdir(parents=True)
    specs = {
        "instruction": f"Count the songs of {task_id}.",
        "supervisor": SUPERVISOR,
        "datetime": "2023-05-18T12:00:00",
        "db_version": "0.1.0",
        "canary_string": "canary",
    }
    (folder / "specs.json").write_text(json.dumps({**specs, **changes}))
    if difficulty is not None:
        (truth / "metadata.json").write_text(json.dumps({"difficulty": difficulty}))
        (truth / "evaluation.py").write_text("def evaluate(): ...")
        (truth / "test_data.json").write_text("[]")
        (truth / "answer.json").write_text("3")
        (truth / "solution.json").write_text(json.dumps(SOLUTION))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training scenarios with two instances each, and one test task without ground truth."""
    root = tmp_path / "world"
    datasets = root / "data" / "datasets"
    datasets.mkdir(parents=True)
    (root / "data" / "version.txt").write_text("0.1.0\n")
    train = ["aaa_1", "aaa_2", "bbb_10", "bbb_2", "ccc_1", "ccc_2"]
    for task_id in train:
        write_task(root, task_id, {"aaa": 3, "bbb": 1, "ccc": 2}[scenario_of(task_id)])
    write_task(root, "ddd_1", None)
    (datasets / "train.txt").write_text("\n".join(train) + "\n\n")
    (datasets / "test_normal.txt").write_text("ddd_1:tag\n")
    return root


TEXTS = {"react": "ae9392e7a2f9919e", "short": "34b73a48cddf208c"}


class TestWorld:
    def test_tasks_are_sorted_from_easy_to_hard(self, root: Path) -> None:
        world = World(root)
        assert world.splits == ("train", "test_normal")
        assert [task.id for task in world.tasks("train")] == ["bbb_2", "bbb_10", "ccc_1", "ccc_2", "aaa_1", "aaa_2"]
        assert world.tasks("train")[0].payload == {
            "task_id": "bbb_2",
            "instruction": "Count the songs of bbb_2.",
            "supervisor": SUPERVISOR,
            "datetime": "2023-05-18T12:00:00",
            "difficulty": 1,
        }
        (test,) = world.tasks("test_normal")
        assert (test.id, test.split, test.payload["difficulty"]) == ("ddd_1", "test_normal", None)

    def test_ground_truth_is_optional(self, root: Path) -> None:
        world = World(root)
        assert world.has_ground_truth("aaa_1")
        assert world.answer("aaa_1") == 3
        assert world.solution("aaa_1") == tuple(SolutionTurn(**turn) for turn in SOLUTION)
        assert not world.has_ground_truth("ddd_1")
        assert world.answer("ddd_1") is None
        assert world.solution("ddd_1") is None

    def test_an_official_solution_is_one_turn(self, root: Path) -> None:
        truth = root / "data/tasks/ddd_1/ground_truth"
        (truth / "compiled_solution.py").write_text("# Canary String: x\ndef solution(apis, requester):\n    pass\n")
        turns = World(root).solution("ddd_1")
        assert turns is not None
        (turn,) = turns
        assert turn.code == "def solution(apis, requester):\n    pass\n\nsolution(apis, requester)"

    def test_the_fingerprint_depends_on_the_evaluation_and_not_on_the_location(self, root: Path) -> None:
        before = World(root).fingerprint_source
        moved = root.rename(root.with_name("moved"))
        assert World(moved).fingerprint_source == before
        json.dumps(before)
        (moved / "data/tasks/aaa_1/ground_truth/solution.json").write_text("[]")
        assert World(moved).fingerprint_source == before
        (moved / "data/tasks/aaa_1/ground_truth/answer.json").write_text("4")
        assert World(moved).fingerprint_source != before

    @pytest.mark.parametrize("name", ["tasks/aaa_1/dbs/gmail.jsonl", "base_dbs/gmail.jsonl", "base_dbs/gmail.db"])
    @pytest.mark.parametrize("ours", [False, True])
    def test_the_fingerprint_depends_on_the_content_of_the_databases(self, root: Path, name: str, ours: bool) -> None:
        """Not on their sizes alone: SQLite's are multiples of 4096 bytes."""
        if ours:
            (root / "data/skillsd.json").write_text("{}")
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = []
        for row in ("one", "two", "one"):
            path.unlink(missing_ok=True)
            if name.endswith(".db"):
                with contextlib.closing(sqlite3.connect(path)) as database, database:
                    database.execute("CREATE TABLE mails (text)")
                    database.execute("INSERT INTO mails VALUES (?)", [row])
            else:
                path.write_text(row)
            found.append(World(root).fingerprint_source)
        assert found[0] != found[1]
        assert found[0] == found[2]

    def test_not_a_root_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"not an AppWorld root: .*data/datasets.*skillsd envs setup appworld"):
            World(tmp_path)

    def test_an_evaluation_task_in_train_is_rejected(self, root: Path) -> None:
        (root / "data/datasets/dev.txt").write_text("aaa_2\n")
        with pytest.raises(UserError, match=r"'dev' and in 'train' \(aaa_2\)"):
            World(root)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ("eee_1", r"names the task 'eee_1', but .*specs\.json is missing"),
            ("../../x", "not an AppWorld id"),
            ("ddd_1\nddd_1", "'ddd_1' twice"),
        ],
    )
    def test_an_invalid_dataset_is_rejected(self, root: Path, ids: str, message: str) -> None:
        (root / "data/datasets/dev.txt").write_text(ids)
        with pytest.raises(UserError, match=message):
            World(root)

    def test_an_empty_dataset_is_not_a_split(self, root: Path) -> None:
        (root / "data/datasets/dev.txt").write_text("\n")
        assert World(root).splits == ("train", "test_normal")
        (root / "data/datasets/train.txt").write_text("\n")
        with pytest.raises(UserError, match=r"ids of the training tasks in .*train\.txt"):
            World(root)

    def test_an_unknown_split(self, root: Path) -> None:
        with pytest.raises(UserError, match=r"unknown split .* 'trian'\. Did you mean 'train'"):
            World(root).tasks("trian")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"db_version": "0.2.0"}, "of version 0.2.0"), ({"supervisor": {}}, "not in AppWorld's format")],
    )
    def test_a_task_that_the_engine_would_reject(self, root: Path, changes: dict[str, Any], message: str) -> None:
        write_task(root, "eee_1", **changes)
        (root / "data/datasets/dev.txt").write_text("eee_1")
        with pytest.raises(UserError, match=message):
            World(root).tasks("dev")


class TestPrompt:
    def test_react_has_the_rules_and_the_task(self, root: Path) -> None:
        task = World(root).tasks("train")[0]
        system, user = first_prompt(task, "react", ["spotify", "venmo"], 40)
        assert (system.role, user.role) == ("system", "user")
        for text in ("spotify, venmo", "40 turns", "complete_task(answer=...)", "show_account_passwords", "page"):
            assert text in system.content
        for text in ("Ann Lee", "ann@mail.com", "5551234567", "2023-05-18 12:00:00", "Count the songs of bbb_2."):
            assert text in user.content

    @pytest.mark.parametrize("style", STYLES)
    def test_the_texts_a_model_reads_are_unchanged(self, style: Style) -> None:
        """Results depend on the exact wording. A deliberate change makes them incomparable with earlier ones."""
        payload = {"instruction": "Count.", "supervisor": SUPERVISOR, "datetime": "2023-05-18T12:00:00"}
        texts = [message.content for message in first_prompt(Task("t_1", "x", "train", payload), style, APPS, 40)]
        for reply in ("", "Done", "```python\n```", "```python\na()\n```\n```python\nb()\n```", "print('\0')\0"):
            found = code_of(reply, style)
            texts.append(found.reason if isinstance(found, Unusable) else f"{found.text}|{found.note}")
        texts.append(observation("abc" * 50, 30))
        assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == TEXTS[style]

    @pytest.mark.parametrize("style", STYLES)
    def test_a_change_of_wording_changes_the_fingerprint(self, style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
        before = prompt.wording(style, APPS)
        assert prompt.wording(style, APPS) == before
        text = {"react": "_TASK", "short": "_SHORT"}[style]
        monkeypatch.setattr(prompt, text, getattr(prompt, text).replace("Task:", "Your task:"))
        assert prompt.wording(style, APPS) != before

    def test_short_is_short(self, root: Path) -> None:
        (message,) = first_prompt(World(root).tasks("train")[0], "short", ["spotify"], 40)
        assert message.content == (
            "I am Ann Lee, ann@mail.com, 5551234567. Today: 2023-05-18. Task: Count the songs of bbb_2."
        )

    @pytest.mark.parametrize(
        ("reply", "code"),
        [
            ("I look.\n```python\nprint(1)\n```\nDone.", "print(1)"),
            ("```py\nprint(1)\n```", "print(1)"),
            ("```\nprint(1)\n```", "print(1)"),
            ("Code: ```Python\nprint(1)```", "print(1)"),
            ("```python\nprint(1", "print(1"),  # truncated: left to Python's error message
            ("1. First\n   ```python\n   if x:\n     y()\n   ```", "if x:\n  y()"),
            ("```json\n{}\n```\n```python\nprint(1)\n```", "print(1)"),
            ("```python\nprint('```')\n```", "print('```')"),
            (" x = 1\nprint(x)\n", "x = 1\nprint(x)"),
        ],
    )
    def test_code_is_found(self, reply: str, code: str) -> None:
        assert code_of(reply) == Code(code)

    def test_only_the_first_block_counts(self) -> None:
        for reply in ("```python\na()\n```\nand\n```python\nb()\n```", "```python\na()\n```python\nb()\n```"):
            found = code_of(reply)
            assert isinstance(found, Code)
            assert found.text == "a()"
            assert "Only the first of your 2 code blocks" in found.note

    @pytest.mark.parametrize(
        "reply",
        ["", " \n", "Done", "Thought: none", "# a comment", "```python\n```", "```json\n{}\n```", "```\nx\0\n```", "("],
    )
    def test_a_reply_without_code_gets_an_explanation(self, reply: str) -> None:
        found = code_of(reply)
        assert isinstance(found, Unusable)
        assert found.reason

    @given(st.text(st.sampled_from("`\n aпython{}()[]'\"\\:=\0\ud800") | st.characters()) | st.text())
    def test_any_reply_is_handled(self, reply: str) -> None:
        found = code_of(reply)
        assert isinstance(found, Unusable) or found.text.encode()

    @pytest.mark.parametrize(
        "piece", ["word ", "(", "-", "f()+", "```\n", "```python ", "`", "not ", "{1:", "lambda:", "f(\n", "x.", "[1,"]
    )
    def test_long_replies_are_parsed_quickly(self, piece: str) -> None:
        start = time.process_time()
        for count in (15_000 // len(piece), 20_000):
            code_of(piece * count + "f()")
        assert time.process_time() - start < 4

    @given(st.lists(st.text(min_size=1), min_size=1), st.sampled_from(STYLES))
    def test_code_of_inverts_turn_text(self, texts: list[str], style: Style) -> None:
        code = "\n".join(f"print({text!r})  # ```" for text in texts if text.isprintable()) or "print(1)"
        assert code_of(turn_text("I print.", code, style)) == Code(code)

    @given(st.sampled_from(STYLES), st.text("`\n ab", max_size=30))
    def test_backticks_in_the_code_do_not_close_the_block(self, style: Style, text: str) -> None:
        code = f's = """{text}"""\nprint(s)'
        assert code_of(turn_text("", code, style)) == Code(code)

    def test_short_turns_are_plain_code(self) -> None:
        assert turn_text("I print.", "print(1)\n", "short") == "print(1)"
        assert turn_text("I print.", "print(1)\n", "react") == "I print.\n```python\nprint(1)\n```"

    @given(st.text(), st.integers(1, 50))
    def test_an_observation_keeps_its_head_and_tail(self, output: str, limit: int) -> None:
        shown = observation(output, limit)
        if len(output) <= limit:
            assert shown == output
            return
        head, note, tail = output[: limit - limit // 3], "characters left out]", output[len(output) - limit // 3 :]
        assert shown == f"{head}\n[{len(output) - limit} {note}\n{tail}"


def call(name: str, *args: str, error: str | None = None) -> dict[str, Any]:
    app, api = name.split(".")
    return {"app": app, "api": api, "args": list(args), "ok": error is None, "error": error}


def turn(*calls: dict[str, Any], **changes: Any) -> dict[str, Any]:
    info = {"code": "print(1)", "calls": list(calls), "error": None, "completed": False, "output_chars": 9}
    return {**info, **changes}


PASSWORDS = call("supervisor.show_account_passwords")
LOGIN = call("spotify.login", "username", "password")
LIBRARY = call("spotify.show_song_library", "access_token", "page_index")
SONG, LIKE = call("spotify.show_song", "song_id"), call("spotify.like_song", "song_id", "access_token")
END = turn(call("supervisor.complete_task", "answer"), completed=True, passes=["a", "b", "c"], failures=[], tests=3)


def skill_of(infos: Sequence[dict[str, Any]], success: bool, style: Style = "react") -> Skill:
    skill = summarise_turns(infos, success, style)
    assert skill is not None
    return skill


class TestSummarise:
    def test_a_success_gives_a_workflow(self) -> None:
        docs = turn(call("api_docs.show_api_descriptions", "app_name"))
        infos = [
            docs,
            turn(PASSWORDS),
            turn(LOGIN),
            turn(LIBRARY),
            turn(LIBRARY, LIBRARY, SONG, LIKE, SONG, SONG, LIKE),
        ]
        skill = skill_of([*infos, END], True)
        assert skill.golden_workflow == (
            "1. apis.supervisor.show_account_passwords() -> password; "
            "2. apis.spotify.login(username, password) -> access_token; "
            "3. apis.spotify.show_song_library(access_token, page_index) page by page; "
            "4. for each: apis.spotify.show_song(song_id), apis.spotify.like_song(song_id, access_token); "
            "5. apis.supervisor.complete_task(answer)"
        )
        assert skill.success_analysis == (
            "Solved with spotify in 6 turns. Reading all pages was right. The task wanted an answer."
        )
        assert skill.mistake_analysis == ""

    def test_the_short_style(self) -> None:
        skill = skill_of([turn(PASSWORDS, LOGIN), turn(LIBRARY, LIBRARY), END], True, "short")
        assert skill == Skill(
            "",
            "",
            "supervisor.show_account_passwords(); spotify.login(username, password); "
            "loop spotify.show_song_library(access_token, page_index); supervisor.complete_task(answer)",
        )

    def test_errors_and_how_they_were_resolved(self) -> None:
        infos = [
            turn(error="Exception: No API named 'find' found in the spotify app."),
            turn(call("spotify.login", "user", error='Exception: Response status code is 422:\n{"x": 1}'), error="x"),
            turn(LOGIN),
            turn(call("spotify.like_song", "song_id", error="Response status code is 401")),
            turn(error="KeyError: 'tok_123'"),
            turn(error="KeyError: 'tok_456'"),
            turn(error="TimeoutError: the code took longer than 30 seconds"),
            turn(code=None, error="no code"),
        ]
        mistakes = skill_of(infos, False).mistake_analysis
        assert mistakes == (
            "complete_task was never called, so the task stayed unfinished. "
            "apis.spotify.login failed (wrong or missing arguments); it worked with (username, password). "
            "apis.spotify.like_song failed (not authorised) and never worked. "
            "1 turn failed with an API or app that does not exist. 2 turns failed with KeyError. "
            "1 turn failed with too long a run. 1 answer held no code to run."
        )

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            ("400: x", "bad request"),
            ("Response status code is 401", "not authorised"),
            ("HTTP 403", "forbidden"),
            ("status 404", "not found"),
            ("Response status code is 409:\n{}", "conflict"),
            ("422", "wrong or missing arguments"),
            ("HTTP 500", "refused"),
            ("something else", "an error"),
        ],
    )
    def test_the_kinds_of_errors(self, error: str, kind: str) -> None:
        skill = skill_of([turn(call("spotify.like_song", error=error)), END], True)
        assert skill.mistake_analysis == f"apis.spotify.like_song failed ({kind}) and never worked."

    def test_a_failures_workflow_has_no_changes(self) -> None:
        wrong = {**END, "passes": ["a"], "failures": ["assert answers match the hidden one", "assert no other change"]}
        skill = skill_of([turn(PASSWORDS, LOGIN), turn(LIKE), wrong], False)
        assert "like_song" not in skill.golden_workflow
        assert summarise_turns([turn(LOGIN), turn(LIKE), wrong], False, "short") is None
        assert "complete_task" not in skill.golden_workflow
        assert skill.mistake_analysis == (
            "2 of 3 checks failed after the task was called complete; the answer was wrong."
        )
        assert "These calls worked: supervisor.show_account_passwords" in skill.success_analysis

    @pytest.mark.parametrize("style", STYLES)
    def test_an_episode_without_calls_gives_no_skill(self, style: Style) -> None:
        assert summarise_turns([turn(), turn(error="NameError: x"), turn(code=None)], False, style) is None

    def test_the_picture_is_the_code_and_its_output(self, root: Path) -> None:
        turns = (
            Turn("```python\nprint(1)\n```", "1", 0, 0, turn(LOGIN)),
            Turn("x", "Failed", 0, 0, turn(error="NameError: x")),
            Turn("no code", "Write code.", 0, 0, turn(code=None, error="no code")),
        )
        trajectory = Trajectory(
            Task("t_1", "appworld", "train"), (), (), (), (), 0, turns, Outcome.FAILED, 0.0, False, 0
        )
        pictures = [load("appworld", {"root": str(root)}).picture(trajectory, place) for place in (None, 0, 1, 2)]
        assert pictures == [
            None,
            {"kind": "code", "input": "print(1)", "output": "1", "error": None},
            {"kind": "code", "input": "print(1)", "output": "Failed", "error": "NameError: x"},
            None,
        ]

    @settings(max_examples=50, deadline=None)
    @given(st.data(), st.booleans(), st.sampled_from(STYLES))
    def test_skills_are_short_and_contain_no_values(self, data: st.DataObject, success: bool, style: Style) -> None:
        # "~" makes a value an invalid name; "7Q" avoids the summariser's own phrases ("missing").
        secret = st.text(string.ascii_letters + string.digits + "@._-", min_size=6, max_size=12).map("~{}7Q".format)
        name = st.text(string.ascii_lowercase + "_", min_size=1, max_size=40).filter(str.isidentifier)
        secrets: list[str] = []

        def draw_secret() -> str:
            secrets.append(data.draw(secret))
            return secrets[-1]

        def draw_error() -> str | None:
            form = data.draw(
                st.sampled_from(
                    [None, "{}", "KeyError: '{}'", "{}: x", "Response status code is 422: {}", "401 {}", "timeout {}",
                     "Exception: No API named '{}' found in the x app.", "appworld.{}Error: {}"]
                )
            )  # fmt: skip
            return form and form.replace("{}", draw_secret())

        infos = []
        for _ in range(data.draw(st.integers(1, 8))):
            calls = []
            for _ in range(data.draw(st.integers(0, 5))):
                error = draw_error()
                args = [*data.draw(st.lists(name, max_size=4)), draw_secret()]
                app, api = data.draw(name), data.draw(name | st.just("login"))
                calls.append({"app": app, "api": api, "args": args, "ok": error is None, "error": error})
            calls.append({"app": draw_secret(), "api": "x", "args": [], "ok": True, "error": None})
            infos.append(turn(*calls, code=f"x = {draw_secret()!r}", error=draw_error()))
        infos[-1].update(completed=True, passes=[draw_secret()], failures=[f"answers {draw_secret()}"], tests=2)
        skill = summarise_turns(infos, success, style)
        if skill is None:
            return
        text = "\n".join((skill.success_analysis, skill.mistake_analysis, skill.golden_workflow))
        assert not [value for value in secrets if value in text or value[1:] in text]
        assert len(text) < 1200
        assert style == "react" or len(text) <= MAX_SHORT_CHARS + 2


class Engine:
    """Returns steps like the environment's and records the played tasks."""

    def __init__(self, succeeds: bool = True) -> None:
        self.played: list[str] = []
        self._succeeds = succeeds

    async def play(self, task: Task, actions: Sequence[str]) -> list[Step]:
        self.played.append(task.id)
        infos = [turn(LOGIN), END]
        assert len(actions) == len(infos)
        last = len(infos) - 1
        return [
            Step(f"{task.id} {place}", place == last, float(place == last), self._succeeds and place == last, info)
            for place, info in enumerate(infos)
        ]


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
class TestDemonstrations:
    def stream(self, root: Path, engine: Engine, count: int, **options: Any) -> list[Demonstration]:
        given: dict[str, Any] = {"split": "train", "seed": 1, "style": "short", "rules": {"a": 1}, **options}
        found = demonstrate(
            World(root), engine.play, lambda task: first_prompt(task, given["style"], ["spotify"], 9), **given
        )
        return list(islice(found, count))

    def test_each_training_task_once_per_epoch_with_the_engines_outputs(self, root: Path) -> None:
        engine = Engine()
        found = self.stream(root, engine, 12)
        assert sorted(engine.played) == sorted(demonstration.task.id for demonstration in found[:6])
        assert {demonstration.task.id for demonstration in found[6:]} == set(engine.played)
        for demonstration in found:
            assert [turn.action for turn in demonstration.turns] == [turn["code"] for turn in SOLUTION]
            assert [turn.observation for turn in demonstration.turns] == [
                f"{demonstration.task.id} {n}" for n in (0, 1)
            ]

    def test_solutions_are_played_again_only_if_they_changed(self, root: Path) -> None:
        first = self.stream(root, Engine(), 12)
        engine = Engine()
        assert self.stream(root, engine, 12) == first
        assert engine.played == []
        changed = [{**SOLUTION[0], "code": "print(apis)"}, SOLUTION[1]]
        (root / "data/tasks/bbb_2/ground_truth/solution.json").write_text(json.dumps(changed))
        self.stream(root, engine, 1)
        assert engine.played == ["bbb_2"]
        self.stream(root, engine, 1, style="react")
        assert len(engine.played) == 7

    def test_recordings_depend_on_all_that_decides_the_outputs(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
        rules = {"a": 1, "world": World(root).fingerprint_source}
        found = [recording_path(rules)]
        found.append(recording_path({**rules, "a": 2}))
        (root / "data/base_dbs").mkdir()
        (root / "data/base_dbs/gmail.db").write_text("mails")
        found.append(recording_path({**rules, "world": World(root).fingerprint_source}))
        monkeypatch.setattr(demonstrations, "VERSION", "0.1.4")
        found.append(recording_path(rules))
        monkeypatch.undo()
        monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
        paths.venv().mkdir(parents=True)
        (paths.venv() / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
        found.append(recording_path(rules))
        assert len(set(found)) == len(found)

    def test_an_interrupted_recording_resumes(self, root: Path) -> None:
        class Breaks(Engine):
            async def play(self, task: Task, actions: Sequence[str]) -> list[Step]:
                if len(self.played) == 4:
                    raise RuntimeError("the engine died")
                return await super().play(task, actions)

        first, second = Breaks(), Engine()
        with pytest.raises(RuntimeError, match="died"):
            self.stream(root, first, 1)
        self.stream(root, second, 1)
        assert len(first.played) == 4
        assert len(second.played) == 2

    def test_skills_come_from_the_summariser(self, root: Path) -> None:
        workflow = "spotify.login(username, password); supervisor.complete_task(answer)"
        assert {found.skill for found in self.stream(root, Engine(), 12, skill_share=1)} == {Skill("", "", workflow)}
        assert {found.skill for found in self.stream(root, Engine(), 12, skill_share=0)} == {None}
        some = [found.skill is not None for found in self.stream(root, Engine(), 600, skill_share=0.5)]
        assert 240 < sum(some) < 360

    def test_guided_scenarios_are_the_same_for_all_seeds(self, root: Path) -> None:
        guided = [
            {scenario_of(found.task.id) for found in stream if found.skill}
            for seed in (1, 2)
            for stream in [self.stream(root, Engine(), 30, skill_share=0, guided_only=0.34, seed=seed)]
        ]
        assert guided[0] == guided[1]
        assert len(guided[0]) == 1

    def test_difficulties(self, root: Path) -> None:
        found = self.stream(root, Engine(), 12, difficulties=[1, 3])
        assert {scenario_of(demonstration.task.id) for demonstration in found} == {"aaa", "bbb"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "test_normal"}, "for the split 'train' only"),
            ({"skil_share": 1}, "Did you mean 'skill_share'"),
            ({"skill_share": 2}, "expected a share"),
            ({"difficulties": 1}, "expected a list"),
            ({"difficulties": [7]}, "of difficulty 7 has a reference solution"),
        ],
    )
    def test_invalid_options_are_rejected(self, root: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            self.stream(root, Engine(), 1, **options)

    def test_failed_solutions_are_excluded(self, root: Path) -> None:
        with pytest.raises(UserError, match="no demonstrations"):
            self.stream(root, Engine(succeeds=False), 1)


def test_the_prompts_example_turn_can_be_parsed() -> None:
    task = Task("t_1", "appworld", "train", {"instruction": "x", "supervisor": SUPERVISOR, "datetime": "2023"})
    example = first_prompt(task, "react", ["a"], 1)[0].content.partition("A turn looks like this:\n")[2]
    found = code_of(example)
    assert isinstance(found, Code)
    ast.parse(found.text)
    assert not found.note


def test_a_short_reply_is_code_even_if_invalid() -> None:
    assert code_of("answer = (", "short") == Code("answer = (")
    assert isinstance(code_of("answer = ("), Unusable)
    assert code_of("Look:\n```python\nprint(1)\n```", "short") == Code("print(1)")
    assert isinstance(code_of("", "short"), Unusable)
