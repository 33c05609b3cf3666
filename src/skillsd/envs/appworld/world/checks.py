"""Helpers of the evaluations. The builder copies this text to the head of every task's ``evaluation.py``.

AppWorld hands an evaluation two states of all the databases, before and after the episode. ``models`` is that pair.
"""

import json


def given_answer(models):
    """What the agent passed to ``complete_task``; ``<<NOT_GIVEN>>`` where it never called it."""
    return json.loads(models.end.supervisor.Task.all()[0].answer)


def added(models, name):
    """The records of one table, named as in "venmo.Transaction", that are there only afterwards."""
    return models.changed_records(name)[0]


def updated(models, name):
    """The records of one table that are there before and after and differ, as they are afterwards."""
    return models.changed_records(name)[1]


def of_user(records, relation, main_user):
    """The records whose ``relation`` ("user", "sender") is the supervisor.

    An agent may have deleted the account, and then the relation leads to nobody: that fails tests, not the evaluation.
    """
    kept = []
    for record in records:
        user = getattr(record, relation)
        # The phone's users have a number and no address, those of the other apps an address and no number.
        known = {getattr(user, "email", None), getattr(user, "phone_number", None)}
        if known & {main_user.email, main_user.phone_number}:
            kept.append(record)
    return kept


def collateral(models, allowed):
    """Changes beyond the allowed ones, as {table: what}; empty where the episode touched nothing else.

    ``allowed`` maps a table to how many records may be added, updated or removed in it, and which fields of the
    updated ones may differ. Fewer changes are none of its business: that is what the other tests are for.
    """
    surplus = {}
    for name in models.changed_model_names():
        limit = allowed.get(name, {})
        more, other, fewer = models.changed_records(name)
        fields = set()
        for record in other:
            fields |= models.changed_field_names(name, record.id, ignore=["updated_at", "last_logged_in"])
        counts = {"added": len(more), "updated": len(other), "removed": len(fewer)}
        over = {kind: count for kind, count in counts.items() if count > limit.get(kind, 0)}
        foreign = sorted(fields - set(limit.get("fields", ())))
        if over or foreign:
            surplus[name] = {"counts": counts, "fields": foreign}
    return surplus
