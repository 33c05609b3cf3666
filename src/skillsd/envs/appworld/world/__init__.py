"""Our own task world for the original AppWorld engine.

AppWorld's official tasks have to be downloaded by each user and are not always available. This package builds a
replacement in AppWorld's format: invented people with songs, notes, payments and mails, and tasks about them, each with
a reference solution and an evaluation. It is *not* the AppWorld benchmark, and results on it don't transfer to it.

Two scripts, run by AppWorld's Python (its dependencies conflict with ours):

    python build.py --root ROOT     writes ROOT/data
    python verify.py --root ROOT    plays every task: the solution must succeed, mistakes must not

Modules that don't need AppWorld (people, lives, scenarios, tasks) import only the standard library.

A change to any source here but verify.py, comments included, changes the world's version and requires a rebuild. The
texts of tasks, tests and checks.py are also part of the tasks' fingerprint: changing them invalidates comparisons with
earlier results.
"""
