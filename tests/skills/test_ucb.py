"""Rules that pick a skill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillsd.errors import UserError
from skillsd.skills import ucb


@dataclass(frozen=True)
class Arm:
    id: int
    picks: int
    mean_reward: float
    source_reward: float = 0.0


def arms_of(*records: tuple[int, float]) -> list[Arm]:
    return [Arm(i + 1, picks, mean) for i, (picks, mean) in enumerate(records)]


records = st.tuples(st.integers(0, 50), st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))
banks = st.lists(records, min_size=1, max_size=8).map(lambda drawn: arms_of(*drawn))
tried_banks = banks.map(lambda arms: [Arm(arm.id, arm.picks + 1, arm.mean_reward) for arm in arms])


def test_scores_computed_by_hand() -> None:
    assert ucb.ucb_score(0.5, 1, 1, 1.0) == 0.5  # ln 1 = 0
    assert ucb.ucb_score(0.5, 4, 8, 0.0) == 0.5
    # 0.25 + 1 * sqrt(ln 8 / 2) = 0.25 + sqrt(1.0397207708)
    assert ucb.ucb_score(0.25, 2, 8, 1.0) == pytest.approx(0.25 + 1.0196669, abs=1e-6)
    assert ucb.ucb_score(0.25, 2, 8, 2.0) == pytest.approx(0.25 + 2.0393338, abs=1e-6)


@pytest.mark.parametrize(("picks", "total"), [(0, 3), (4, 3), (-1, 1)])
def test_impossible_counts_are_refused(picks: int, total: int) -> None:
    with pytest.raises(ValueError, match="1 <= picks <= total_picks"):
        ucb.ucb_score(0.5, picks, total, 1.0)


def test_picks_computed_by_hand() -> None:
    # N = 10. c = 0.5: 0.6 + 0.5 sqrt(2.302585 / 9) = 0.853 against 0.2 + 0.5 sqrt(2.302585 / 1) = 0.959
    arms = arms_of((9, 0.6), (1, 0.2))
    assert ucb.pick(arms, 0.5) == 1
    assert ucb.pick(arms, 0.1) == 0  # 0.651 against 0.352


def test_newest_unpicked_arm_comes_first() -> None:
    assert ucb.pick(arms_of((0, 0.0), (0, 1.0), (0, 0.0), (3, 1.0)), 1.0) == 2


def test_no_arms_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        ucb.pick([], 1.0)


@given(banks, st.floats(0, 10))
def test_unpicked_arm_comes_first(arms: list[Arm], c: float) -> None:
    chosen = arms[ucb.pick(arms, c)]
    assert chosen.picks == 0 or all(arm.picks for arm in arms)


@given(tried_banks)
def test_c_of_zero_is_greedy(arms: list[Arm]) -> None:
    assert arms[ucb.pick(arms, 0.0)].mean_reward == max(arm.mean_reward for arm in arms)


@given(tried_banks.flatmap(lambda arms: st.tuples(st.just(arms), st.permutations(arms))), st.floats(0, 10))
def test_order_of_arms_only_breaks_ties(both: tuple[list[Arm], list[Arm]], c: float) -> None:
    arms, shuffled = both
    one, other = arms[ucb.pick(arms, c)], shuffled[ucb.pick(shuffled, c)]
    total = sum(arm.picks for arm in arms)
    assert ucb.ucb_score(one.mean_reward, one.picks, total, c) == ucb.ucb_score(
        other.mean_reward, other.picks, total, c
    )


@given(tried_banks, st.floats(0, 10))
def test_picked_arm_has_the_highest_score(arms: list[Arm], c: float) -> None:
    total = sum(arm.picks for arm in arms)
    scores = [arm.mean_reward + c * math.sqrt(math.log(total) / arm.picks) for arm in arms]
    assert scores[ucb.pick(arms, c)] == pytest.approx(max(scores))


@given(banks, st.integers())
def test_random_depends_only_on_seed_and_arms(arms: list[Arm], seed: int) -> None:
    first = ucb.picking_rule("random", seed=seed)(arms, 1.0)
    assert first == ucb.picking_rule("random", seed=seed)(arms, 1.0)
    assert first is not None
    assert 0 <= first < len(arms)


def test_random_covers_all_arms_and_seeds_differ() -> None:
    def draws(seed: int) -> list[int | None]:
        return [ucb.picking_rule("random", seed=seed)(arms_of((n, 0.0), (0, 1.0), (0, 0.5)), 1.0) for n in range(60)]

    assert set(draws(0)) == {0, 1, 2}
    assert min(draws(0).count(i) for i in range(3)) >= 10
    assert draws(0) != draws(1)


def test_with_a_prior_a_new_skill_comes_first_only_if_its_source_was_good() -> None:
    """Means with the source's reward as one pick: (3 * 0.8 + 0.4) / 4 = 0.7 and 0.5. N = 5, so with c = 0.1 the bonus
    is 0.1 sqrt(1.6094 / 4) = 0.063 and 0.1 sqrt(1.6094) = 0.127: 0.763 against 0.627. With c = 1: 1.334 and 1.769."""
    arms = [Arm(1, 3, 0.8, 0.4), Arm(2, 0, 0.5, 0.5)]
    assert (ucb.pick_with_prior(arms, 0.1), ucb.pick_with_prior(arms, 1.0)) == (0, 1)
    assert ucb.pick(arms, 0.1) == 1  # the paper's: never picked first
    assert ucb.picking_rule("ucb-prior") is ucb.pick_with_prior


@given(banks, st.floats(0, 3))
def test_with_a_prior_every_skill_is_picked_in_the_end(arms: list[Arm], c: float) -> None:
    """The bonus of a skill that is not picked grows without bound, for c > 0."""
    picks = {arm.id: arm.picks for arm in arms}
    for _ in range(40):
        now = [Arm(arm.id, picks[arm.id], arm.mean_reward, 0.5) for arm in arms]
        chosen = now[ucb.pick_with_prior(now, c)]
        scores = {
            arm.id: (arm.picks * arm.mean_reward + 0.5) / (arm.picks + 1)
            + c * math.sqrt(math.log(sum(picks.values()) + len(arms)) / (arm.picks + 1))
            for arm in now
        }
        assert scores[chosen.id] == pytest.approx(max(scores.values()))
        picks[chosen.id] += 1


def test_last_is_the_newest() -> None:
    assert ucb.picking_rule("last")(arms_of((0, 1.0), (5, 0.0)), 1.0) == 1


def test_best_is_the_highest_mean_and_among_equals_the_newest() -> None:
    assert ucb.picking_rule("best")(arms_of((1, 0.5), (9, 0.75), (2, 0.75), (0, 0.25)), 1.0) == 2


def test_error_for_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'ubc'.*Did you mean 'ucb'"):
        ucb.picking_rule("ubc")


# -- rules of your own ----------------------------------------------------------------------------------------------


class Odd:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __call__(self, arms: object, c: float) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


ARMS = arms_of((0, 0.0), (1, 0.5), (2, 0.5))


@pytest.mark.parametrize("answer", [0, 2, np.int64(1), np.uint8(2), None])
def test_an_index_is_any_integer_or_none(answer: object) -> None:
    chosen = ucb.choose(Odd(answer), ARMS, 1.0)  # type: ignore[arg-type]
    assert chosen == answer
    assert type(chosen) in (int, type(None))


@pytest.mark.parametrize("answer", [3, -1, True, np.bool_(True), 1.0, "1", np.int64(7), [0], np.array([0, 1]), ARMS[0]])
def test_anything_else_is_an_error_with_the_rules_file(answer: object) -> None:
    with pytest.raises(UserError, match=r"'Odd' returned .* expected an index from 0 to 2, or None .*test_ucb\.py:\d+"):
        ucb.choose(Odd(answer), ARMS, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), ZeroDivisionError()])
def test_a_rule_that_raises_is_an_error_with_its_line(error: BaseException) -> None:
    with pytest.raises(UserError, match=rf"'Odd' raised {type(error).__name__}.*test_ucb\.py:\d+"):
        ucb.choose(Odd(error), ARMS, 1.0)  # type: ignore[arg-type]
