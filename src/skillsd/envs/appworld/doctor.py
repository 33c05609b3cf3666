"""AppWorld's lines in `skillsd doctor`."""

from __future__ import annotations

from skillsd.envs.appworld import client, paths
from skillsd.envs.appworld.environment import listed
from skillsd.envs.hosts import HostBrokenError


def report() -> list[str]:
    """Whether the engine, our own tasks and the official data are available, and which protections the jail has."""
    engine = "installed" if paths.installed() else f"not installed ({paths.SETUP})"
    own = "built" if paths.built_by(paths.world_folder()) == paths.builder_version() else "not built"
    lines = [f"{engine}; our own tasks {own}; official data: {paths.official() or 'not found ($APPWORLD_ROOT)'}"]
    if not paths.installed():
        return lines
    try:
        found, failure = client.protections(paths.python(), paths.official() or paths.world_folder()), ""
    except HostBrokenError as error:
        found, failure = [], f" ({error})"
    lines.append(f"jail for the model's code: {', '.join(found) or 'no protection'}{failure} (docs/appworld.md)")
    missing = [name for name in client.PROTECTIONS if name not in found]
    lines += [f"MISSING PROTECTION: {client.describe([name])}" for name in missing]
    if missing:
        lines.append(f"episodes are refused, except with environment.options.unsafe_without={listed(missing)}")
    return lines
