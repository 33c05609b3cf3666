/* View 1: what was run, what it gained, and the state of health in words. */

function overviewView({ run }) {
  return DATA.is_table ? [tableSummary(), el("hr"), runSummary(run)] : runSummary(run);
}

function runSummary(place) {
  const run = RUNS[place];
  return [
    el("div", { class: "title" },
      el(DATA.is_table ? "h2" : "h1", null, `${run.method} on ${run.config.environment.name}`),
      el("span", { class: `pill ${run.state.name}` }, run.state.text)),
    el("p", { class: "note" }, run.work),
    run.missing.map((text) => el("p", { class: "warning" }, foreign(text))),
    el("div", { class: "cards" }, run.accuracy.map(gainCard), numbersCard(run)),
    el("div", { class: "halves" },
      section("Health", "From the run's metrics (docs/metrics.md).", health(run)),
      section("Learning curve", "Held-out tasks, plain prompt; the band is the 95 % interval over tasks.",
        accuracyChart([place], "episodes"))),
    section("What was run", null, facts(run), manifest(run)),
  ];
}

function gainCard({ how, split, tasks, before, after }) {
  const last = after || before;
  const change = after && 100 * (after.accuracy - before.accuracy);
  return el("div", { class: "card wide" },
    el("h3", null, `Accuracy, ${how}`),
    el("p", { class: "big" }, after && el("span", { class: "before" }, percent(before.accuracy), " → "),
      percent(last.accuracy)),
    el("p", { class: "note" }, change !== null && `${signed(change, 1)} points · `,
      `${count(tasks)} tasks of ${split}`, after ? ` · after ${count(last.episodes)} episodes` : " · before training"),
    el("table", { class: "bars" }, el("tbody", null, [["before", before], ["after", after]].map(([name, point]) =>
      point && el("tr", null, el("th", { scope: "row" }, name),
        el("td", null, intervalBar(point.accuracy, point.interval, `${percent(point.accuracy)} ${range(point.interval)}`)),
        el("td", { class: "num" }, `${percent(point.accuracy)} ${range(point.interval)}`))))));
}

function numbersCard(run) {
  const known = Object.fromEntries(run.facts);
  const pairs = [
    ["episodes", known.episodes], ["training time", known["training time"]],
    ["iterations", run.series.metrics.iteration && count(run.series.metrics.iteration.at(-1))],
    run.skills && ["skills in the bank", count(run.skills.total)],
  ].filter(Boolean);
  return el("div", { class: "card" }, el("h3", null, "Spent"), el("dl", { class: "tiles" },
    pairs.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value || "–")))));
}

function health(run) {
  if (!run.health.length) return el("p", { class: "empty" }, "Nothing to say yet: no iteration is finished.");
  const marks = { bad: ["!", "problem"], good: ["✓", "good"], plain: ["·", "note"] };
  return el("ul", { class: "health" }, run.health.map(({ level, text, cure }) => {
    const [mark, word] = marks[level];
    return el("li", { class: level }, el("span", { class: "mark", "aria-hidden": "true" }, mark),
      el("span", { class: "hidden" }, `${word}: `),
      el("div", null, foreign(text), cure && el("p", { class: "cure" }, foreign(`${cure}.`))));
  }));
}

function facts(run) {
  return el("dl", { class: "facts" }, run.facts.map(([name, value]) => [el("dt", null, name), el("dd", null, foreign(value))]),
    el("dt", null, "folder"), el("dd", null, foreign(run.folder)));
}

function manifest(run) {
  const json = (value) => block(JSON.stringify(value, null, 2));
  return [
    el("details", null, el("summary", null, "The configuration"), json(run.config)),
    el("details", null, el("summary", null, "The manifest"), Object.keys(run.manifest).length
      ? json(run.manifest) : el("p", { class: "empty" }, "The run has no manifest.json.")),
  ];
}

// -- a table --------------------------------------------------------------------------------------------------------

function tableSummary() {
  const { table: made } = DATA;
  return [
    el("div", { class: "title" }, el("h1", null, DATA.title), el("span", { class: "pill" }, plural(RUNS.length, "run"))),
    made.missing && el("p", { class: "empty" }, made.missing),
    made.budgets.map((budget) => section(`Results after ${count(budget.episodes)} episodes`,
      `${count(made.tasks)} tasks of ${made.split}, plain prompt. Intervals are over the ${made.unit}; differences are to ${made.against}, paired.`,
      results(budget.rows, made.against))),
    (made.notes || []).map((note) => el("p", { class: "warning" }, foreign(note))),
    RUNS.length > 1 && section("Learning curves",
      `${Object.keys(DATA.means).length ? "Thick: the mean of a method's runs, with its 95 % interval. Thin: its runs." : "With 95 % intervals over tasks."} Held-out tasks, plain prompt.`,
      legend([...new Set(RUNS.map((run) => run.method))]), accuracyChart(RUNS.map((_, at) => at), "episodes")),
    section("Runs", "Choose one to see it in all views.", runList()),
  ];
}

function results(rows, against) {
  const figure = (row, name, interval) => [percent(row[name]), " ", el("span", { class: "muted" }, range(row[interval]))];
  const difference = (row) => {
    const found = row.difference && row.difference.accuracy;
    if (!found) return row.method === against ? "reference" : "–";
    const ends = found.interval && ` [${found.interval.map((end) => signed(100 * end, 1)).join(", ")}]`;
    return [signed(100 * found.mean, 1), el("span", { class: "muted" }, ends)];
  };
  return table("Results", ["method", "accuracy, 95 % interval", ">accuracy", ">difference, points", ">completion", ">greedy",
    ">runs", ">episodes", ">training"], rows.map((row) => ({ cells: [
    el("strong", null, row.method),
    intervalBar(row.accuracy, row.interval, `${percent(row.accuracy)} ${range(row.interval)}`),
    figure(row, "accuracy", "interval"), difference(row), figure(row, "completion", "completion_interval"),
    figure(row, "greedy_accuracy", "greedy_interval"),
    row.cells === row.cells_asked ? count(row.cells) : `${row.cells} of ${row.cells_asked}`,
    count(row.episodes), row.episodes ? duration(row.seconds) : "–",
  ] })));
}

function runList() {
  return table("Runs", ["run", "model", "state", "health", ">before", ">after"], RUNS.map((run, place) => {
    const gain = run.accuracy[0];
    const bad = run.health.filter((one) => one.level === "bad");
    return { cells: [
      link(run.label, { view: "overview", run: place }), foreign(run.model), run.state.text,
      bad.length ? foreign(bad.map((one) => one.text).join("; ")) : "no finding",
      gain ? percent(gain.before.accuracy) : "–", gain && gain.after ? percent(gain.after.accuracy) : "–",
    ] };
  }));
}
