"""Our own task world for the real AppWorld engine.

The official tasks of AppWorld have to be downloaded by whoever uses them, and cannot be reached from everywhere. So
that the engine can be used without them, this folder builds data of its own in AppWorld's format: invented people
with invented songs, notes, payments and mails, and tasks over them with a reference solution and an evaluation each.
It is *not* the AppWorld benchmark, and results on it say nothing about results there.

Two scripts are run by AppWorld's own Python (its dependencies cannot live beside ours):

    python build.py --root ROOT     writes ROOT/data
    python verify.py --root ROOT    plays every task: the solution must score, mistakes must not

What needs no AppWorld (people, lives, scenarios, tasks) imports nothing but the standard library.
"""
