"""A summariser of your own: it turns a finished trajectory into a skill.

    cd examples; skillsd train sokoban-nano skills.summariser=custom_summariser:Shortest

The package's own summarisers are the environment's rules, any OpenAI-compatible endpoint, or the policy itself
(docs/summarisers.md). Whoever writes a skill, it is checked before it enters the bank: no copy of the trajectory, no
secret of the task, not too long.
"""

from skillsd import Skill, Trajectory


class Shortest:
    """Writes a workflow of the moves that led to success, but only for a success with few turns.

    Args:
        most_turns: longer successes get no skill. In a recipe: ``summariser: {options: {most_turns: 8}}``.
    """

    def __init__(self, most_turns: int = 12) -> None:
        self.most_turns = most_turns

    async def summarise(self, trajectory: Trajectory) -> Skill | None:
        """The skill, or None if there is nothing to learn. Called for many trajectories at once; may await an API."""
        if not trajectory.success or len(trajectory.turns) > self.most_turns:
            return None
        return Skill(
            success_analysis=f"solved in {len(trajectory.turns)} turns",
            mistake_analysis="",
            golden_workflow=" ".join(turn.action for turn in trajectory.turns),
        )
