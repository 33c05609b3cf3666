"""Renderers of the generated blocks, by name. They read the package and the JSON files of results, nothing else."""

from collections.abc import Callable

from blocks import appworld, llm, performance, reference, skills, sweeps

Renderer = Callable[[], str]

RENDERERS: dict[str, Renderer] = {
    **reference.RENDERERS,
    **sweeps.RENDERERS,
    **appworld.RENDERERS,
    **llm.RENDERERS,
    **performance.RENDERERS,
    **skills.RENDERERS,
}
