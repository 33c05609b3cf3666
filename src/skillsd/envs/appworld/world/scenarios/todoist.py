"""Tasks in Todoist."""

from __future__ import annotations

from random import Random

from ..lives import World
from ..people import Person
from .base import ANSWER, DONE, Draw, Scenario, Turn, login

LOST_TASK = 'apis.todoist.delete_task(task_id=tasks[-1]["task_id"], access_token=token)'
RENAMED_TASK = 'apis.todoist.update_task(task_id=tasks[0]["task_id"], title="Stray", access_token=token)'
STRAY_DONE = """for name, project_id in projects.items():
    for task in apis.todoist.show_tasks(access_token=token, project_id=project_id)["no_section_tasks"]:
        if not task["is_completed"]:
            apis.todoist.update_task(access_token=token, task_id=task["task_id"], is_completed=True)"""
PROJECTS = (
    'projects = {p["name"]: p["project_id"] for p in apis.todoist.show_projects(access_token=token, page_limit=20)}\n'
)


def draw_todo(world: World, person: Person, rng: Random) -> Draw:
    projects = world.lives[person.email].projects
    project = rng.choice(sorted(projects))
    title = rng.choice([todo.title for todo in projects[project] if not todo.done])
    return Draw({"project": project, "title": title}, {"titles": [title]})


def evaluate_done(test, public_data, private_data, main_user, models, ground_truth_answer):
    titles = set(private_data.titles)
    changed = of_user(updated(models, "todoist.Task"), "user", main_user)  # noqa: F821
    done = {task.title for task in changed if task.is_completed}
    with test("assert one of the tasks was completed"):
        test.case(len(done & titles), ">=", 1)
    with test("assert all of the tasks were completed, and no others"):
        test.case(done, "==", titles)
    with test("assert the answer is right"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        tasks = {"updated": len(titles), "fields": ["is_completed"]}
        test.case(collateral(models, {"todoist.Task": tasks}), "==", {})  # noqa: F821


DONE_TODO = Scenario(
    id="donetodo",
    difficulty=1,
    apps=("todoist",),
    kind="train",
    instructions=(
        'Mark the task "<title>" in my <project> project on Todoist as completed.',
        'I have finished "<title>". Complete it in the <project> project of my Todoist.',
        'In Todoist, check off "<title>" in the project <project>.',
    ),
    draw=draw_todo,
    turns=(
        login("todoist"),
        Turn("I find the project.", PROJECTS + 'project_id = projects["<project>"]\nprint(project_id)'),
        Turn(
            "I complete the task with this title.",
            "tasks = apis.todoist.show_tasks(access_token=token, "
            'project_id=project_id)["no_section_tasks"]\n'
            'tasks = [t for t in tasks if t["title"] == "<title>"]\n'
            'apis.todoist.update_task(access_token=token, task_id=tasks[0]["task_id"], is_completed=True)',
        ),
        DONE,
    ),
    evaluate=evaluate_done,
    harms=(RENAMED_TASK, STRAY_DONE),
)


def draw_urgent(world: World, person: Person, rng: Random) -> Draw:
    projects = world.lives[person.email].projects
    project = rng.choice(sorted(projects))
    titles = [todo.title for todo in projects[project] if todo.priority == "high" and not todo.done]
    return Draw({"project": project}, {"titles": titles}, len(titles))


URGENT = Scenario(
    id="urgenttodos",
    difficulty=2,
    apps=("todoist",),
    kind="train",
    instructions=(
        "Complete all open high-priority tasks in my <project> project on Todoist and tell me how many there were.",
        "Mark every open task with high priority in the <project> project of my Todoist as completed. "
        "How many were they?",
        "In Todoist, check off all open tasks of high priority in the project <project>, and tell me their number.",
    ),
    draw=draw_urgent,
    turns=(
        login("todoist"),
        Turn("I find the project.", PROJECTS + 'project_id = projects["<project>"]\nprint(project_id)'),
        Turn(
            "I list its open tasks of high priority.",
            'tasks = apis.todoist.show_tasks(access_token=token, project_id=project_id, priority="high", '
            'is_completed=False)["no_section_tasks"]\n'
            "answer = len(tasks)\nprint(answer)",
        ),
        Turn(
            "I complete each of them.",
            'for task in tasks:\n    apis.todoist.update_task(access_token=token, task_id=task["task_id"], '
            "is_completed=True)",
        ),
        ANSWER,
    ),
    evaluate=evaluate_done,
    harms=(LOST_TASK, STRAY_DONE),
)

SCENARIOS = (DONE_TODO, URGENT)
