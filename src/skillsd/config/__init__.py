"""A run is one readable YAML file: `schema` and `sft` are its keys, `load` reads it, `problems` says what is wrong."""

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
