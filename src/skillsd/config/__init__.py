"""Recipes: the keys (`schema`, `skills`, `sft`), loading (`load`), error messages (`problems`), docs (`describe`)."""

from skillsd.config.load import RECIPES, build, dump, load, read, recipes
from skillsd.config.schema import (
    CheckpointSection,
    CurriculumSection,
    EngineSection,
    EnvironmentSection,
    EvaluationSection,
    LogSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    RolloutSection,
    RunConfig,
    TeacherSection,
    TrainingSection,
)
from skillsd.config.sft import ArchitectureSection, CheckSection, SftConfig, WarmStartSection
from skillsd.config.skills import SkillsSection, SummariserSection

__all__ = [
    "RECIPES",
    "ArchitectureSection",
    "CheckSection",
    "CheckpointSection",
    "CurriculumSection",
    "EngineSection",
    "EnvironmentSection",
    "EvaluationSection",
    "LogSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "RolloutSection",
    "RunConfig",
    "SftConfig",
    "SkillsSection",
    "SummariserSection",
    "TeacherSection",
    "TrainingSection",
    "WarmStartSection",
    "build",
    "dump",
    "load",
    "read",
    "recipes",
]
