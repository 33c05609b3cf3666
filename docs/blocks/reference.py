"""Tables from the package: methods, configuration keys, metrics."""

from collections.abc import Callable

from blocks.common import table
from skillsd.config import RunConfig, SftConfig
from skillsd.config.describe import markdown
from skillsd.methods import METHODS
from skillsd.training import metric_docs


def methods() -> str:
    columns = ["method", "reward weight", "lambda", "over", "imitation", "teacher's context", "teacher's weights"]
    columns += ["student's prompt", "sampler", "description"]
    rows = []
    for m in METHODS.values():
        reward, weight, imitation = (f"{weight:g}" for weight in (m.reward_weight, m.lambda_sdl, m.imitation_weight))
        over = "-" if m.teacher == "none" else m.normaliser
        switches = ["-" if value == "none" else value for value in (m.context, m.teacher)]
        row = [f"`{m.name}`", reward, weight, over, imitation, *switches, m.student_prompt, m.sampler, m.description]
        rows.append(row)
    return table(columns, rows)


RENDERERS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "configuration": lambda: markdown(RunConfig),
    "configuration-sft": lambda: markdown(SftConfig),
    "metrics": metric_docs.markdown,
}
