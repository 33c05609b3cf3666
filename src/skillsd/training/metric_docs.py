"""Every metric of metrics.jsonl and evaluations.jsonl, with its meaning and healthy range; ``docs/metrics.md``."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class MetricDoc:
    """One metric, or several of one form.

    Attributes:
        name: as in the files; ``*`` stands for any ending.
        symbol: in the paper's equations, if it has one there.
        meaning: what it measures, and its unit.
        healthy: what to expect of a run that works, and what a value outside of it points to.
    """

    name: str
    meaning: str
    healthy: str = ""
    symbol: str = ""


DOCS: tuple[MetricDoc, ...] = (
    MetricDoc("iteration", "number of finished iterations"),
    MetricDoc(
        "episodes",
        "training episodes so far, those that measure uplift or reading included",
        "the unit of all comparisons",
    ),
    MetricDoc("sampled_tokens", "tokens sampled in training episodes so far"),
    MetricDoc("seconds", "wall-clock seconds of all iterations so far, without evaluations"),
    # rollouts
    MetricDoc(
        "rollout/accuracy", "share of training episodes with full success", "rises; 0 or 1 everywhere teaches nothing"
    ),
    MetricDoc("rollout/reward", "mean reward R_i of the training episodes, in [0, 1]", "rises", "R_i"),
    MetricDoc("rollout/turns", "mean turns of an episode"),
    MetricDoc("rollout/tokens", "mean tokens of a trajectory, prompt included"),
    MetricDoc("rollout/sampled_tokens_per_second", "tokens sampled per second of the rollout phase"),
    MetricDoc(
        "rollout/entropy_estimate",
        "mean of -log pi_old over sampled tokens, nats: an unbiased estimate of the sampling policy's mean entropy, at "
        "its temperature",
        "falls slowly; near 0 the policy has stopped exploring",
        "H(pi_old)",
    ),
    MetricDoc(
        "rollout/reward_std_in_groups",
        "standard deviation of the rewards within a group, mean over groups",
        "above 0: it is what L_GRPO learns from",
        "std R",
    ),
    MetricDoc(
        "rollout/policy_lag",
        "updates between the oldest weights that sampled a trajectory and those that train on it, mean",
        "0; with training.ahead=1, minibatches x epochs",
    ),
    MetricDoc(
        "rollout/cached_prompt_tokens",
        "share of the requests' prompt tokens that the sampler found in its prefix cache (vLLM only)",
        "high with many turns: each turn's prompt begins with the last one's",
    ),
    MetricDoc("rollout/sampler_restarts", "samplers that failed and were started anew (vLLM only)", "0"),
    MetricDoc("rollout/moved_requests", "requests that a failed sampler left to another (vLLM only)", "0"),
    MetricDoc("rollout/dropped_groups", "groups given up because an episode failed in every attempt", "0"),
    MetricDoc(
        "outcome/*",
        "share of episodes by how they ended: solved, failed, truncated_turns, truncated_tokens, env_error, timeout",
        "truncated_tokens near 0, else raise rollout.trajectory_tokens; env_error and timeout are always 0 here",
    ),
    MetricDoc(
        "infra_failures/*", "episodes that the infrastructure broke, by outcome, retried ones included", "absent"
    ),
    # reading
    MetricDoc(
        "reading/told",
        "success of the teacher's weights on training tasks, told the task's skill (every reading.every iterations)",
        "well above reading/misled",
    ),
    MetricDoc("reading/misled", "the same, told a wrong skill"),
    MetricDoc(
        "reading/gap",
        "reading: told minus misled",
        "keeps its first value; near 0 the teacher no longer reads its skill, and a small L_SDL means nothing",
    ),
    MetricDoc("reading/student/*", "the same of the student, at each sync with teacher.min_reading"),
    MetricDoc("reading/synced", "whether that sync was made", "1"),
    MetricDoc(
        "reading/kept_up",
        "success of the groups with a skill in the student's own prompt (reading.share); rollout/* is without them",
        "near 1 with practice tasks",
    ),
    # the batch
    MetricDoc(
        "batch/zero_advantage_groups",
        "share of groups whose rewards are all equal: L_GRPO has no gradient there",
        "below about 0.7; near 1 the tasks are too hard or too easy for the policy",
        "A_i = 0",
    ),
    MetricDoc(
        "batch/groups_with_teacher",
        "share of groups with a teacher's log-probs",
        "0 until tasks come again (the bank starts empty), then near 1; stays 0 if no task is visited twice",
    ),
    MetricDoc(
        "batch/tokens_with_teacher",
        "share of action tokens with a teacher's log-prob; with objective.normaliser=tokens, the paper's L_SDL is this "
        "times loss/teacher_k3",
        "as above",
        "s",
    ),
    MetricDoc(
        "batch/groups_with_context",
        "share of groups with a skill or reference solution in the student's or teacher's prompt (methods with one)",
        "as above",
    ),
    MetricDoc(
        "batch/skills_over_budget",
        "share of groups whose skill exceeds skills.teacher_extra_tokens or the model's length",
        "0",
    ),
    MetricDoc("batch/imitated", "share of groups with a success to imitate (self-imitation only)"),
    # the loss
    MetricDoc("loss/policy_loss", "mean clipped surrogate over action tokens", "near 0 on-policy", "L_GRPO"),
    MetricDoc("loss/ratio", "mean of pi / pi_old over action tokens", "near 1", "r, rho"),
    MetricDoc("loss/ratio_max", "largest pi / pi_old", "below about 2; larger: too many or too large steps per batch"),
    MetricDoc("loss/clip_fraction", "share of action tokens whose gradient is clipped", "below about 0.1"),
    MetricDoc("loss/kl_old_new", "estimate (k3) of KL(pi_old || pi) over action tokens, nats", "below about 0.05"),
    MetricDoc(
        "loss/entropy", "exact mean entropy of the student, nats (only with a divergence over the whole vocabulary)"
    ),
    MetricDoc("loss/importance", "mean truncated importance weight (objective.importance_cap only)", "near 1"),
    MetricDoc("loss/importance_capped", "share of tokens whose importance weight is capped", "near 0"),
    MetricDoc("loss/lambda_sdl", "weight of the distillation in this iteration", symbol="lambda"),
    MetricDoc(
        "loss/teacher_log_ratio",
        "mean of log pi - log q over taught tokens, nats",
        "above 0; exactly 0 means that the teacher does not react to its context",
        "l_t",
    ),
    MetricDoc("loss/teacher_log_ratio_square", "mean of its square; with the mean, the spread", symbol="l_t^2"),
    MetricDoc(
        "loss/teacher_k3",
        "mean of rho (exp(-l) - 1 + l) over taught tokens, nats: the paper's L_SDL, whatever the estimator",
        "falls slowly; a fall can also mean that the teacher has stopped reading its context",
        "L_SDL",
    ),
    MetricDoc("loss/distil_value", "mean of the estimator's own divergence over taught tokens, nats"),
    MetricDoc("loss/distil_clamped", "share of taught tokens that objective.distil_clamp leaves without gradient", "0"),
    MetricDoc("loss/imitation_loss", "mean negative log-likelihood of imitated tokens, nats", "falls"),
    MetricDoc("loss/*", "mean of a loss term of your own (objective.terms)"),
    MetricDoc(
        "sampler_trainer_logprob_diff/*",
        "quantiles of |sampler's - learner's log-prob| over action tokens, of the same weights (without a policy lag), "
        "nats",
        "max below 1e-4 in float32, p99 below 0.3 in bfloat16; larger: one of them has other weights",
    ),
    MetricDoc(
        "step/grad_norm", "norm of the gradient before clipping, mean over applied steps", "steady; null if none"
    ),
    MetricDoc("step/learning_rate", "learning rate of this iteration"),
    MetricDoc("step/applied", "optimiser steps that were applied", "training.minibatches x training.epochs"),
    MetricDoc("step/refused", "steps refused because a loss or gradient was not finite (not-finite/)", "0"),
    # skills
    MetricDoc("skills/new", "skills that were added to the bank in this iteration"),
    MetricDoc("skills/tasks", "tasks with at least one skill", "grows to the number of training tasks", "B(x)"),
    MetricDoc("skills/skills", "skills in the bank"),
    MetricDoc("skills/picked", "skills that were picked at least once"),
    MetricDoc("skills/picks", "picks so far", symbol="N"),
    MetricDoc(
        "skills/first_picks",
        "share of the picks so far that were a skill's first one",
        "below 0.5; near 1 no skill is tried twice, and rewards don't decide (skills.pick, skills.per_group)",
    ),
    MetricDoc("skills/credited", "rollouts that skills were credited with so far"),
    MetricDoc("summaries/submitted", "trajectories submitted to the summariser so far"),
    MetricDoc("summaries/added", "skills of theirs that were new to the bank"),
    MetricDoc("summaries/duplicate", "skills whose text the task had already"),
    MetricDoc("summaries/no_skill", "trajectories of which the summariser wrote no skill"),
    MetricDoc("summaries/pending", "summaries that are being written", "0 with skills.deterministic"),
    MetricDoc("summaries/resumed", "summaries that were started again on resume"),
    MetricDoc(
        "summaries/rejected_*",
        "skills that were refused, by reason: malformed, empty, too_long, copies_format, copies_prompt, "
        "copies_trajectory, leaks_answer",
        "few; all of them: the summariser's prompt or model does not fit",
    ),
    MetricDoc(
        "summaries/failed*", "summaries that failed: the summariser raised, or failed_http_429 and the like", "0"
    ),
    MetricDoc("summaries/timeout", "summaries that took longer than skills.timeout_seconds", "0"),
    MetricDoc("summaries/skipped_*", "trajectories that were not summarised: no reward, or a spent budget"),
    MetricDoc("summaries/condensed", "episodes that were shortened for the summariser"),
    MetricDoc("summaries/calls", "requests to the summarising model"),
    MetricDoc("summaries/retries", "repeated requests"),
    MetricDoc("summaries/calls_without_usage", "answers without a token count (then 4 characters count as one token)"),
    MetricDoc("summaries/answers_*", "answers that are refused, empty, or tool_calls (docs/evaluation.md)", "0"),
    MetricDoc("summaries/tokens_*", "tokens in and out of the summarising model"),
    MetricDoc("summaries/cost", "cost at summariser.price_in and price_out, in their currency"),
    # system
    MetricDoc("memory/peak_mib", "peak memory of the process, MiB"),
    MetricDoc("memory/gpu_peak_mib", "peak GPU memory that torch allocated, MiB"),
    MetricDoc(
        "time/*",
        "wall-clock seconds by phase: rollout, teacher, uplift, update, summarise, records (writing trajectories); "
        "iteration is their sum. With training.ahead=1 rollout is the time that training waited for rollouts",
    ),
    # evaluations.jsonl
    MetricDoc("eval*/accuracy", "share of held-out episodes with full success, plain prompt", "rises"),
    MetricDoc(
        "eval*/interval", "95 % interval of the accuracy over tasks: the panel's sampling error, not the training's"
    ),
    MetricDoc("eval*/completion", "mean reward of held-out episodes", "rises"),
    MetricDoc("eval*/completion_interval", "95 % interval of the completion over tasks"),
    MetricDoc("eval*/scenario_accuracy", "share of scenarios all of whose tasks are solved (AppWorld's SGC)"),
    MetricDoc("eval*/tasks", "tasks that were played"),
    MetricDoc("eval*/episodes", "episodes that were played"),
    MetricDoc("eval*/mean_turns", "mean turns of an episode"),
    MetricDoc("eval*/seconds", "wall-clock seconds of the evaluation"),
    MetricDoc("eval*/split", "name of the split"),
    MetricDoc("eval*/fingerprint", "identifies the panel: different ones are not comparable"),
    MetricDoc("eval*/temperature", "of sampling; 0 is greedy (`eval_greedy/...`)"),
)


def describe(name: str) -> MetricDoc | None:
    """The documentation of a metric; None if there is none."""
    exact = next((doc for doc in DOCS if doc.name == name), None)
    return exact or next((doc for doc in DOCS if fnmatchcase(name, doc.name)), None)


def markdown() -> str:
    """A table of all metrics."""
    rows = [f"| `{d.name}` | {d.symbol and f'`{d.symbol}`'} | {_cell(d.meaning)} | {_cell(d.healthy)} |" for d in DOCS]
    return "\n".join(["| metric | symbol | meaning | healthy |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
