"""An engine's section of the recipe: its own keys, what it can do, and how to make it. Light: no torch.

To add an engine, subclass `EngineOptions` and register it under the entry point group ``skillsd.engines``, or name it
``module:Class`` in a recipe's ``engine.name``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from skillsd.engines.spec import Capabilities, EngineSpec, LoraOptions
from skillsd.errors import UserError
from skillsd.options import Options

if TYPE_CHECKING:
    from skillsd.engines.base import Engine
    from skillsd.engines.estimate import Estimator, Workload

__all__ = ["Capabilities", "EngineOptions", "EngineSpec", "LoraOptions"]


class EngineOptions(Options):
    """The section ``engine`` of a recipe, for one engine."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    name: str
    """A registered engine, or ``module:Class``."""

    def build(self, spec: EngineSpec) -> Engine:
        """Load the model and start whatever the engine needs.

        Raises:
            UserError: if that is impossible, with what to change.
        """
        raise NotImplementedError

    def check(self, spec: EngineSpec) -> None:
        """Refuse, before anything is loaded, what the engine can't do.

        Raises:
            UserError: naming the engine, the setting that asks too much, and why.
        """
        able = self.provides()
        for capability, setting in spec.needs.items():
            if not getattr(able, capability):
                raise UserError(
                    f"{setting} needs {_IN_WORDS[capability]}, which the engine {self.name!r} can't do: change that "
                    "setting, or engine.name"
                )

    def provides(self) -> Capabilities:
        """What the engine can do with these options."""
        return self.capabilities

    def estimator(self, spec: EngineSpec, workload: Workload) -> Estimator | None:
        """Estimates memory and time on this machine (`skillsd doctor`); None if the engine has no estimate.

        Raises:
            UserError: if the model's sizes can't be found out.
        """
        return None

    def usage(self, spec: EngineSpec, workload: Workload, iterations: int) -> list[str]:
        """What a run uses of a server, as lines for `skillsd doctor`; none if nothing runs on one."""
        return []

    def for_learner(self) -> EngineOptions:
        """The options of an engine that only has to load, score and export: without a separate sampler."""
        return self

    def resume_key(self) -> dict[str, Any]:
        """The options that may not change when a run is resumed; all of them unless overridden."""
        return self.model_dump()


_IN_WORDS = {
    "distribution": "log-probs of the whole vocabulary",
    "temperature": "a temperature other than 1",
    "teacher_snapshot": "a teacher with weights of its own",
    "teacher_average": "a teacher that is a moving average",
    "teacher_external": "a teacher that is another model",
    "teacher_sampling": "rollouts by the teacher",
    "lora": "LoRA",
    "refuses_non_finite": "a step that refuses what is not finite",
    "deterministic": "determinism",
    "exact_resume": "an exact resume",
    "publishes_folder": "weights in a folder",
    "concurrent": "sampling while it trains",
}
