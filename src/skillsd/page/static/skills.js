/* View 5: the bank. Each task's skills with their source, use and value; picks over iterations; what was refused. */

function skillsView({ run, task }) {
  const { skills } = RUNS[run];
  if (!skills) {
    return [el("h1", null, "Skills"), el("p", { class: "empty" },
      "This run has no skills: its method uses none, or none were written yet.")];
  }
  const all = skillsOf(run);
  const tasks = [...new Set(all.map((skill) => skill.task))];
  const picks = (name) => all.filter((skill) => skill.task === name).reduce((sum, skill) => sum + skill.picks, 0);
  const byPicks = new Map(tasks.map((name) => [name, picks(name)]));
  tasks.sort((a, b) => byPicks.get(b) - byPicks.get(a));
  const chosen = tasks.includes(task) ? task : tasks[0];
  return [
    el("div", { class: "title" }, el("h1", null, "Skills"), el("span", { class: "pill" }, `${plural(skills.total, "skill")} of ${plural(tasks.length, "task")}`)),
    el("p", { class: "note" }, `Picked by ${skills.rule}${skills.rule === "ucb" ? `: mean credit + ${number(skills.ucb_c, 2)} √(ln N / n)` : ""}; credit: ${skills.credit}.`,
      all.length < skills.total && ` The ${count(all.length)} that were picked most often.`),
    el("h2", { class: "hidden" }, "Charts"),
    el("div", { class: "charts" }, skillCharts(run)),
    el("div", { class: "halves" }, section("What became of the trajectories", null, summaries(skills)),
      section("Uplift", "What a skill is worth to the student itself.", uplift(skills))),
    chosen === undefined ? el("p", { class: "empty" }, "The bank is empty.") : [
      section("By task", "Ordered by picks.", taskChoice(run, tasks, byPicks, chosen)),
      el("div", { class: "skill-list" }, all.filter((skill) => skill.task === chosen)
        .sort((a, b) => b.picks - a.picks || b.id - a.id).map((skill) => skillCard(run, skill, skills))),
      section("When they were picked", "In the iterations of this report.", pickHistory(run, chosen)),
    ],
  ];
}

function skillCharts(run) {
  return ["skills/picks", "skills/new", "skills/refused"].map((metric) => {
    const [, title, note] = CHARTS.find(([name]) => name === metric) || [metric, "Picks so far", "Times that a skill was put into a prompt."];
    const shown = curve([run], metric, title, "episodes", { height: 140 });
    return shown && el("figure", null, el("figcaption", null, el("h3", null, title), el("p", { class: "note" }, note)), shown);
  });
}

const REASONS = {
  added: "new skills", duplicate: "text that the task had already", no_skill: "nothing to write down",
  rejected_malformed: "refused: malformed", rejected_empty: "refused: empty", rejected_too_long: "refused: too long",
  rejected_copies_format: "refused: copies the prompt's format", rejected_copies_prompt: "refused: copies the prompt",
  rejected_copies_trajectory: "refused: copies the trajectory", rejected_leaks_answer: "refused: gives the answer away",
  failed: "the summariser failed", timeout: "took too long", skipped_budget: "not written: the budget was spent",
};

function summaries({ summaries: counts }) {
  const { submitted, ...ends } = counts;
  const rows = Object.entries(ends).sort((a, b) => b[1] - a[1]).map(([name, n]) => ({ cells: [
    REASONS[name] || name.replaceAll("_", " "), count(n), submitted ? percent(n / submitted) : "–",
  ] }));
  return table("Trajectories", [`of ${count(submitted)} trajectories`, ">number", ">share"], rows);
}

function uplift({ uplift: found }) {
  if (!found) return el("p", { class: "empty" }, "Not measured. To do so: skillsd skills uplift RUN --json RUN/uplift.json, then the report again.");
  const ends = found.interval && ` [${found.interval.map((end) => signed(100 * end, 1)).join(", ")}]`;
  return el("p", null, el("strong", null, `${signed(100 * found.mean, 1)} points`), el("span", { class: "muted" }, ends),
    ` success with the skill in the student's prompt minus without, over ${plural(found.tasks, "task")}, after ${plural(found.iteration, "iteration")}.`);
}

function taskChoice(run, tasks, byPicks, chosen) {
  const select = el("select", { "aria-label": "Task", onchange: () => visit({ view: "skills", run, task: tasks[select.selectedIndex] }) },
    tasks.map((name) => el("option", { selected: name === chosen }, `${name.slice(0, 40)} (${plural(byPicks.get(name), "pick")})`)));
  const place = tasks.indexOf(chosen);
  const go = (to) => tasks[to] && visit({ view: "skills", run, task: tasks[to] });
  return el("div", { class: "stepper" }, button("‹", () => go(place - 1), { "aria-label": "Previous task", disabled: !place }), select,
    button("›", () => go(place + 1), { "aria-label": "Next task", disabled: place === tasks.length - 1 }));
}

function skillCard(run, skill, bank) {
  const parts = [["What worked", skill.success], ["Mistake", skill.mistake], ["Steps", skill.workflow]].filter(([, text]) => text);
  const facts = [
    ["picked", plural(skill.picks, "time")], [bank.credit === "uplift" ? "mean uplift" : "mean reward", number(skill.mean_reward)],
    ["UCB score", skill.score === null ? "∞ (never picked)" : number(skill.score)], ["credited episodes", count(skill.credited)],
  ];
  if (skill.uplift) {
    const [withIt, without, episodes] = skill.uplift;
    facts.push(["uplift", `${signed(100 * (withIt - without), 0)} points (${percent(withIt)} with, ${percent(without)} without; ${episodes} episodes)`]);
  }
  return el("article", { class: "card skill", id: `skill-${skill.id}` },
    el("h3", null, `Skill ${skill.id}`), parts.map(([title, text]) => [el("h4", null, title), block(text)]),
    el("dl", { class: "figures" }, facts.map(([name, value]) => [el("dt", null, name), el("dd", null, value)])),
    el("p", { class: "note" }, "From ", sourceLink(run, skill.source), ": ", outcome(skill.source_outcome), `, reward ${number(skill.source_reward)}.`));
}

/** The episode that a skill was written from; its name alone if the report does not have it. */
function sourceLink(run, source) {
  if (!Array.isArray(source)) return foreign(source);
  const [iteration, task, member] = source;
  const text = `iteration ${iteration}, episode ${member + 1}`;
  const known = episodesOf(run).some((one) => one.iteration === iteration && one.task === task && one.member === member);
  return known ? episodeLink({ run, iteration, task, member }, text) : `${text} (not in this report)`;
}

function pickHistory(run, task) {
  const seen = episodesOf(run).filter((episode) => episode.task === task && episode.member === 0);
  if (!seen.length) return el("p", { class: "empty" }, "No group of this task is in this report.");
  return table("Picks", ["iteration", "skill", ">solved"], seen.map((first) => {
    const group = episodesOf(run).filter((one) => one.iteration === first.iteration && one.task === task);
    return { cells: [
      link(`iteration ${first.iteration}`, { view: "groups", run, iteration: first.iteration, task }),
      first.skill === null ? "none" : `skill ${first.skill}`, `${group.filter((one) => one.success).length} of ${group.length}`,
    ] };
  }));
}
