"""AppWorld's lines in `skillsd doctor`."""

from __future__ import annotations

from skillsd.envs.appworld import client, paths


def report() -> list[str]:
    """Whether AppWorld's engine, our tasks and the official ones are here, and how well its jail holds."""
    engine = "installed" if paths.installed() else f"not installed ({paths.SETUP})"
    own = "built" if paths.built_by(paths.world_folder()) == paths.builder_version() else "not built"
    lines = [f"{engine}; our own tasks {own}; official data: {paths.official() or 'not found ($APPWORLD_ROOT)'}"]
    if paths.installed():
        held = client.protections(paths.python())
        lines.append(f"jail for the model's code: {', '.join(held) or 'no protection'} (docs/appworld.md)")
        lines += [f"OPEN: {name} (would be: {words})" for name, words in client.PROTECTIONS.items() if name not in held]
    return lines
