"""Random input at every place where a user, a model or a server hands something in: no traceback, no hang over 10 s.

    PYTHONPATH=tests python studies/reliability/cases.py --cases 10000

Inputs are made by hypothesis: shipped recipes with values replaced, random overrides, skills, summaries, actions,
level files, trajectory records, endpoint answers. A case passes if the code returns, or raises the error that its
documentation names for bad input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from fake_endpoint import FakeEndpoint, Reply, completion
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from skillsd.config import RunConfig, SftConfig, load
from skillsd.config.load import read, recipes
from skillsd.engines.endpoint import Endpoint, EndpointError, Names
from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.envs import registry
from skillsd.envs.sokoban.level_files import read_levels
from skillsd.errors import UserError
from skillsd.prompting.templates import load_template, render_skill
from skillsd.prompting.thinking import without_thinking
from skillsd.rollouts.records import trajectory_from_json, trajectory_to_json
from skillsd.skills.summarise import SummaryError, check_skill
from skillsd.skills.summary_prompt import parse_skill
from skillsd.types import Message, Outcome, Skill, Task, Trajectory, Turn

HANG = 10
"""Seconds."""

text = st.text(max_size=60) | st.sampled_from(["", "nan", "1e999", "~", "!!python/object:os.system x", "\0"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def paths(data: Any, so_far: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(data, dict):
        for key, inner in data.items():
            yield (*so_far, key)
            yield from paths(inner, (*so_far, key))


def keys_of(kind: type[BaseModel], so_far: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield so_far + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{so_far}{name}.")


NAMES: Names = {name: f"summariser.{name}" for name in EndpointOptions.model_fields}
LEVEL = "; one\n#####\n#@$.#\n#####\nTitle: first\n\n######\n#.$ @#\n######\n"
ALMOST = [
    '{"success_analysis": "a", "mistake_analysis": "", "golden_workflow": "b"',
    '{"success_analysis": 1, "mistake_analysis": null, "golden_workflow": []}',
    "[" * 3000,
    '{"a":' * 3000,
]
"""Answers that are nearly a skill, or deep."""


class Cases:
    """The kinds of input. Each method takes a hypothesis `data` object and does one case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shipped = {name: read(name) for name in recipes()}
        self.recipes = [(SftConfig if "warm_start" in data else RunConfig, data) for data in shipped.values()]
        self.keys = [*keys_of(RunConfig)]
        self.task_set = registry.load("sokoban", {"preset": "nano"})
        self.tasks = self.task_set.tasks("train")
        tokens, mask, turns = (1, 2, 3), (False, False, True), (Turn("Up", "x", 2, 3),)
        prompt = (Message("user", "x"),)
        self.good_record = trajectory_to_json(
            Trajectory(self.tasks[0], prompt, tokens, mask, (0.0, 0.0, -1.0), 2, turns, Outcome.FAILED, 1.0, False, 0)
        )
        self.template = load_template("teacher")
        self.reply = Reply({})
        self.server = FakeEndpoint(answer=lambda request: self.reply)
        self.loop = asyncio.new_event_loop()
        options = EndpointOptions(model="m", base_url=self.server.url, max_retries=0, timeout_seconds=5)
        self.endpoint = Endpoint(options, Counter(), NAMES)

    def recipe(self, data: st.DataObject) -> None:
        kind, recipe = data.draw(st.sampled_from(self.recipes))
        changed = json.loads(json.dumps(recipe))
        for _ in range(data.draw(st.integers(1, 3))):
            *outer, last = data.draw(st.sampled_from([*paths(changed)]))
            inner = changed
            for key in outer:
                inner = inner[key]
            inner[last if data.draw(st.booleans()) else data.draw(text)] = data.draw(values)
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        load(kind, str(file))

    def recipe_text(self, data: st.DataObject) -> None:
        file = self.folder / "recipe.yaml"
        _, recipe = data.draw(st.sampled_from(self.recipes))
        whole = yaml.safe_dump(recipe).encode()
        start, end = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
        file.write_bytes(whole[:start] + data.draw(st.binary(max_size=30)) + whole[end:])
        load(RunConfig, str(file))

    def override(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys) if data.draw(st.integers(0, 9)) else text)
        plain = st.integers(-3, 100).map(str) | st.floats(0, 2).map(str) | st.sampled_from(["true", "null", "0", "[]"])
        value = data.draw(plain | text | values.map(lambda value: json.dumps(value, default=str)))
        form = data.draw(st.sampled_from(["{key}={value}"] * 8 + ["{key}", "{value}"]))
        load(RunConfig, "sokoban-nano", [form.replace("{key}", key).replace("{value}", value)])

    def skill(self, data: st.DataObject) -> None:
        skill = Skill(*(data.draw(st.text(max_size=200)) for _ in range(3)))
        source, longest = trajectory(data, self.tasks[0]), data.draw(st.integers(1, 400))
        if check_skill(skill, source, max_chars=longest, secrets=[data.draw(text)]) is None:
            render_skill(skill, self.template)

    def summary(self, data: st.DataObject) -> None:
        answer = data.draw(st.text(max_size=200) | json_values.map(json.dumps) | st.sampled_from(ALMOST))
        parse_skill(answer, cut=data.draw(st.booleans()))

    def thought(self, data: st.DataObject) -> None:
        pieces = st.sampled_from(["<think>", "</think>", "Left", "\n", "<|im_end|>", "<thinking>"])
        without_thinking("".join(data.draw(st.lists(pieces | st.text(max_size=8), max_size=8))))

    def action(self, data: st.DataObject) -> None:
        async def episode() -> None:
            environment = self.task_set.make()
            await environment.reset(data.draw(st.sampled_from(self.tasks)), data.draw(st.integers(0, 2**32)))
            moves = st.sampled_from(["Up", "Down", "Left", "Right", "Answer: Up", "left left", "UP!"])
            for _ in range(data.draw(st.integers(1, 6))):
                if (await environment.step(data.draw(moves | st.text(max_size=60)))).done:
                    break
            await environment.close()

        self.loop.run_until_complete(episode())

    def levels(self, data: st.DataObject) -> None:
        file = self.folder / "levels.xsb"
        rows = st.text("#@$.*+ -_|0123456789;\nTitle:ab", max_size=6)
        found = list(LEVEL)
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.integers(0, len(found)))
            found[place : place + data.draw(st.integers(0, 2))] = data.draw(rows)
        file.write_bytes("".join(found).encode() + data.draw(st.just(b"") | st.binary(max_size=8)))
        read_levels(file)

    def record(self, data: st.DataObject) -> None:
        record = json.loads(json.dumps(self.good_record))
        for _ in range(data.draw(st.integers(1, 2))):
            *outer, last = data.draw(st.sampled_from([*paths(record)]))
            inner = record
            for key in outer:
                inner = inner[key]
            if data.draw(st.booleans()):
                del inner[last]
                break
            inner[last] = data.draw(json_values)
        trajectory_from_json(record)

    def answer(self, data: st.DataObject) -> None:
        content = st.text(max_size=40) | json_values
        body = json_values | st.binary(max_size=60) | content.map(lambda content: completion(content).body)
        headers = st.dictionaries(
            st.sampled_from(["retry-after", "retry-after-ms", "content-type", "x-request-id"]),
            st.text("0123456789-:, GMTabcn.", max_size=20).map(str.strip),
            max_size=2,
        )
        status = data.draw(st.sampled_from([200] * 6 + [204, 301, 400, 401, 404, 408, 413, 422, 429, 500, 503]))
        drawn = data.draw(body)
        self.reply = Reply(drawn, status, data.draw(headers), lost=data.draw(st.sampled_from([0, 0, 0, 1])))
        self.loop.run_until_complete(self.endpoint.ask([Message("user", "Say up.")], max_tokens=5))


EXPECTED: dict[str, type[Exception]] = {"summary": SummaryError, "record": ValueError, "answer": EndpointError}
"""Documented errors for bad input; elsewhere `UserError`."""


def trajectory(data: st.DataObject, task: Task) -> Trajectory:
    texts = data.draw(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), max_size=3))
    turns = tuple(Turn(action, observation, 0, 0) for action, observation in texts)
    prompt = (Message("user", data.draw(st.text(max_size=60))),)
    return Trajectory(task, prompt, (), (), (), 0, turns, Outcome.FAILED, 0.5, False, 0)


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer after {HANG} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Log:
    """What the cases did."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.slowest = 0.0

    def one(self, name: str, case: Callable[[st.DataObject], None]) -> Callable[[st.DataObject], None]:
        def run(data: st.DataObject) -> None:
            self.done[name] += 1
            start = time.monotonic()
            try:
                with in_time():
                    case(data)
            except (UserError, EXPECTED.get(name, UserError)):
                self.refused[name] += 1
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                if "hypothesis" in where.filename:  # it asks for other data
                    self.done[name] -= 1
                    raise
                place = f"{name}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                self.failures[place] += 1
                self.examples.setdefault(place, f"{error!r:.300}")
            self.slowest = max(self.slowest, time.monotonic() - start)

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    random.seed(args.seed)
    begin, log = time.monotonic(), Log()
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        kinds: list[tuple[str, Callable[[st.DataObject], None]]] = [
            (name, getattr(cases, name)) for name, value in vars(Cases).items() if name[0] != "_" and callable(value)
        ]
        for name, case in kinds:
            run = settings(
                max_examples=-(-args.cases // len(kinds)),
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )(given(data=st.data())(log.one(name, case)))
            seed(args.seed)(run)()
            print(f"{name}: {log.done[name]} cases, {log.refused[name]} refused as documented", flush=True)
        cases.server.close()
    figures = {
        "cases": log.done.total(),
        "by kind": dict(log.done),
        "refused as documented": dict(log.refused),
        "failures": dict(log.failures),
        "examples": log.examples,
        "slowest case, seconds": round(log.slowest, 2),
        "seconds": round(time.monotonic() - begin),
        "seed": args.seed,
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    sys.exit(bool(log.failures))


if __name__ == "__main__":
    main()
