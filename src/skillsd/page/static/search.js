/* View 6: search and filter the episodes. */

const SHOWN = 100;
const ORDERS = {
  iteration: ["in order", (a, b) => a.iteration - b.iteration || a.group - b.group || a.member - b.member],
  gap: ["largest gap first", (a, b) => Math.abs(b.gap || 0) - Math.abs(a.gap || 0)],
  reward: ["highest reward first", (a, b) => b.reward - a.reward],
  advantage: ["highest advantage first", (a, b) => b.advantage - a.advantage],
  turns: ["most turns first", (a, b) => b.turns - a.turns],
};

function searchView({ run, query = {} }) {
  if (!episodesOf(run).length) return [el("h1", null, "Search"), noEpisodes(run)];
  const found = el("div", { id: "found" });
  const change = (name, value) => {
    if (value) query[name] = value;
    else delete query[name];
    history.replaceState(null, "", href({ view: "search", run, query }));
    update();
  };
  const update = () => searched(run, query, found);
  const select = (name, label, options) => {
    const made = el("select", { onchange: () => change(name, made.value) },
      options.map(([value, text]) => el("option", { value, selected: (query[name] || "") === value }, text)));
    return el("label", null, label, made);
  };
  const input = el("input", { type: "search", id: "query", placeholder: "task, skill's words, iteration …", value: query.q || "",
    oninput: () => change("q", input.value.trim()) });
  const deep = el("input", { type: "checkbox", checked: query.texts === "1", onchange: () => change("texts", deep.checked ? "1" : "") });
  const skilled = [...new Set(episodesOf(run).map((one) => one.skill))].filter((id) => id !== null).sort((a, b) => a - b);
  queueMicrotask(update);
  return [
    el("h1", null, "Search"),
    el("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      el("label", { class: "wide" }, "Words", input),
      select("outcome", "Outcome", [["", "all"], ["1", "solved"], ["0", "not solved"]]),
      select("teacher", "Teacher", [["", "all"], ["1", "with a teacher"], ["0", "without"]]),
      skilled.length && select("skill", "Skill", [["", "all"], ...skilled.map((id) => [String(id), `skill ${id}`])]),
      select("order", "Order", Object.entries(ORDERS).map(([value, [text]]) => [value === "iteration" ? "" : value, text])),
      el("label", { class: "check" }, deep, "also in actions and observations")),
    found,
  ];
}

let searching = 0;

async function searched(run, query, found) {
  const mine = (searching += 1);
  const words = (query.q || "").toLowerCase().split(/\s+/).filter(Boolean);
  const skills = new Map(skillsOf(run).map((skill) => [skill.id, `${skill.success} ${skill.mistake} ${skill.workflow}`.toLowerCase()]));
  let texts = null;
  if (query.texts === "1" && words.length) {
    found.replaceChildren(el("p", { class: "note", role: "status" }, "Reading all episodes …"));
    texts = await textsOf(run);
    if (mine !== searching) return;
  }
  const fits = (episode) => {
    if (query.outcome && String(episode.success) !== query.outcome) return false;
    if (query.teacher && String(Number(episode.gap !== null)) !== query.teacher) return false;
    if (query.skill && String(episode.skill) !== query.skill) return false;
    const text = `${episode.task} ${episode.outcome.replace("_", " ")} iteration ${episode.iteration} ${skills.get(episode.skill) || ""}`.toLowerCase()
      + (texts ? texts.get(`${episode.iteration}/${episode.group}/${episode.member}`) : "");
    return words.every((word) => text.includes(word));
  };
  const order = ORDERS[query.order] || ORDERS.iteration;
  const all = episodesOf(run).filter(fits).sort(order[1]);
  found.replaceChildren(
    el("p", { class: "note", role: "status" }, `${plural(all.length, "episode")}${all.length > SHOWN ? `, the first ${SHOWN}` : ""}, ${order[0]}. ${RUNS[run].sampling}`),
    all.length ? foundEpisodes(all.slice(0, SHOWN)) : el("p", { class: "empty" }, "No episode fits."));
}

/** The actions and observations of each episode, in lower case. */
async function textsOf(run) {
  const texts = new Map();
  for (const { iteration, chunk: name } of RUNS[run].iterations) {
    const { groups } = await chunk(name);
    groups.forEach((group, place) => group.episodes.forEach((episode, member) => texts.set(`${iteration}/${place}/${member}`,
      episode.turns.map((turn) => `${turn.action} ${turn.observation}`).join(" ").toLowerCase())));
  }
  return texts;
}

function foundEpisodes(episodes) {
  return table("Episodes", ["episode", "task", "outcome", ">reward", ">advantage", ">turns", "skill", ">mean l"], episodes.map((one) => ({ cells: [
    episodeLink(one, `${one.iteration}/${one.group + 1}/${one.member + 1}`), line(one.task, 24), outcome(one.outcome), number(one.reward),
    signed(one.advantage), count(one.turns), one.skill === null ? "–" : `skill ${one.skill}`, gapCell(one.gap),
  ] })));
}
