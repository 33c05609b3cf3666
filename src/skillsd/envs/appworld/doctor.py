"""AppWorld's lines in `skillsd doctor`."""

from __future__ import annotations

from skillsd.envs.appworld import client, paths


def report() -> list[str]:
    """Whether the engine, our own tasks and the official data are available, and which protections the jail has."""
    engine = "installed" if paths.installed() else f"not installed ({paths.SETUP})"
    own = "built" if paths.built_by(paths.world_folder()) == paths.builder_version() else "not built"
    lines = [f"{engine}; our own tasks {own}; official data: {paths.official() or 'not found ($APPWORLD_ROOT)'}"]
    if paths.installed():
        found = client.protections(paths.python())
        lines.append(f"jail for the model's code: {', '.join(found) or 'no protection'} (docs/appworld.md)")
        missing = {name: text for name, text in client.PROTECTIONS.items() if name not in found}
        lines += [f"MISSING PROTECTION: {name} ({text})" for name, text in missing.items()]
    return lines
