/* View 2: how the run went, against episodes or wall-clock time; the runs of a table overlaid, by method. */

const CHARTS = [
  ["eval/accuracy", "Accuracy", "Held-out tasks, plain prompt. Dashed: the untrained model.", { percent: true, part: "evaluations", base: true }],
  ["eval/completion", "Completion", "Mean reward on held-out tasks.", { percent: true, part: "evaluations", base: true }],
  ["rollout/accuracy", "Training accuracy", "Share of training episodes that were solved.", { percent: true }],
  ["rollout/reward_std_in_groups", "Reward's deviation within groups", "What L_GRPO learns from: 0 teaches nothing.", {}],
  ["batch/groups_with_teacher", "Groups with a teacher", "0 until tasks come again; near 1 afterwards.", { percent: true }],
  ["loss/teacher_log_ratio", "Teacher–student gap, mean l", "log π − log q over taught tokens, nats; 0: the teacher ignores its context.", {}],
  ["loss/teacher_k3", "L_SDL", "Mean of ρ (exp(−l) − 1 + l) over taught tokens, nats.", {}],
  ["reading/gap", "Teacher's reading", "Its success told a task's skill, minus told a wrong one; near 0 it no longer reads, and L_SDL means nothing.", { percent: true }],
  ["rollout/entropy_estimate", "Entropy", "Of the sampling policy, nats per token; near 0 it has stopped exploring.", {}],
  ["rollout/turns", "Turns of an episode", "Mean over training episodes.", {}],
  ["rollout/tokens", "Tokens of an episode", "Prompt included; mean over training episodes.", {}],
  ["loss/clip_fraction", "Clipped tokens", "Share of action tokens whose gradient is clipped; below about 10 %.", { percent: true }],
  ["loss/kl_old_new", "KL of an update", "Estimate of KL(π_old ‖ π), nats; below about 0.05.", {}],
  ["step/grad_norm", "Gradient norm", "Before clipping; steady.", {}],
  ["sampler_trainer_logprob_diff/max", "Sampler and trainer, largest difference", "Of the same weights' log-probs, nats; below 1e-4 in float32.", { log: true }],
  ["skills/new", "Skills written", "New in the bank, per iteration.", {}],
  ["skills/refused", "Skills refused", "Summaries that were refused or failed, per iteration.", {}],
  ["skills/picked", "Skills used", "Skills that were picked at least once.", {}],
  ["time/iteration", "Seconds of an iteration", "Wall-clock, evaluations excluded.", {}],
];

function curvesView({ run }) {
  const everyRun = RUNS.map((_, place) => place);
  const runs = DATA.is_table && settings.overlay ? everyRun : [run];
  const methods = [...new Set(runs.map((place) => RUNS[place].method))];
  const choose = (name, value, text) => button(text, () => {
    settings[name] = value;
    render();
  }, { "aria-pressed": String(settings[name] === value) });
  const made = CHARTS.map(([metric, title, note, options]) => {
    const shown = curve(runs, metric, title, settings.cost, options);
    return shown && el("figure", null, el("figcaption", null, el("h3", null, title), el("p", { class: "note" }, note)), shown);
  }).filter(Boolean);
  return [
    el("div", { class: "title" }, el("h1", null, "Curves"),
      el("div", { class: "choice", role: "group", "aria-label": "Against" },
        choose("cost", "episodes", "against episodes"), choose("cost", "seconds", "against wall-clock")),
      DATA.is_table && el("div", { class: "choice", role: "group", "aria-label": "Runs" },
        choose("overlay", true, "all runs"), choose("overlay", false, "the chosen run"))),
    methods.length > 1 && legend(methods),
    runs.length > 1 && Object.keys(DATA.means).length > 0 && el("p", { class: "note" },
      "Thick: the mean of a method's runs at iterations that all have, with its 95 % interval. Thin: its runs."),
    made.length ? [el("h2", { class: "hidden" }, "Charts"), el("div", { class: "charts" }, made)]
      : el("p", { class: "empty" }, "Nothing is measured yet: the first line of metrics.jsonl ends the first iteration."),
  ];
}

/** The chart of a metric; null if no run has it. */
function curve(runs, metric, title, cost, { percent: isPercent, part = "metrics", log, base: hasBase, height }) {
  const rows = (columns) => {
    const [x, y, low, high] = [cost, metric, `${metric}_low`, `${metric}_high`].map((name) => columns[name]);
    return y && x ? y.map((value, at) => ({
      x: x[at], y: value, low: low ? low[at] : null, high: high ? high[at] : null,
    })) : [];
  };
  const lines = runs.map((place) => {
    const run = RUNS[place];
    const alone = runs.length === 1 || !DATA.means[run.method];
    return { name: run.label, method: run.method, rows: rows(run.series[part]), strength: alone ? "only" : "run" };
  });
  if (runs.length > 1) {
    for (const [method, series] of Object.entries(DATA.means)) {
      lines.push({ name: `${method}, mean`, method, rows: rows(series[part]), strength: "mean" });
    }
  }
  if (!lines.some((of) => of.rows.some((row) => isNumber(row.y)))) return null;
  const first = lines.flatMap((of) => (of.strength === "mean" ? [] : of.rows.slice(0, 1))).map((row) => row.y).filter(isNumber);
  const base = hasBase && first.length ? first.reduce((sum, value) => sum + value, 0) / first.length : null;
  return lineChart(lines, { label: title, x: cost === "episodes" ? "training episodes" : "seconds of training",
    percent: isPercent, log, base, height });
}

function accuracyChart(runs, cost) {
  return curve(runs, "eval/accuracy", "Accuracy", cost, { percent: true, part: "evaluations", base: true, height: 230 })
    || el("p", { class: "empty" }, "No evaluation yet.");
}
