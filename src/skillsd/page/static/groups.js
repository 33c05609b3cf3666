/* View 3: an iteration, its groups, and the episodes of one group side by side. */

const OUTCOMES = {
  solved: ["✓", "solved"], failed: ["✗", "failed"], truncated_turns: ["…", "out of turns"],
  truncated_tokens: ["…", "out of tokens"], env_error: ["!", "environment failed"], timeout: ["!", "timed out"],
};

function outcome(name) {
  const [mark, words] = OUTCOMES[name] || ["?", name];
  return el("span", { class: `outcome ${name}` }, el("span", { "aria-hidden": "true" }, `${mark} `), words);
}

/** A mean of l, coloured, with an arrow for people who don't see the colour. */
function gapCell(gap) {
  if (!isNumber(gap)) return "–";
  const name = shade(gap);
  const arrow = name === "same" ? "" : gap < 0 ? "▲ " : "▼ ";
  return el("span", { class: `token ${name}` }, arrow, signed(gap));
}

function noEpisodes(run) {
  return el("p", { class: "empty" }, `There are no episodes to show. ${RUNS[run].sampling}`);
}

async function groupsView({ run, iteration, task }) {
  const { iterations } = RUNS[run];
  if (!iterations.length) return [el("h1", null, "Groups"), noEpisodes(run)];
  const at = iterations.find((one) => one.iteration === iteration) || iterations.at(-1);
  const { groups } = await chunk(at.chunk);
  const chosen = groups.find((group) => group.task === task) || groups[0];
  const episodes = episodesOf(run).filter((episode) => episode.iteration === at.iteration);
  return [
    el("div", { class: "title" }, el("h1", null, "Groups"), iterationChoice(run, at.iteration)),
    el("p", { class: "note" }, RUNS[run].sampling),
    groupList(run, at.iteration, groups, chosen, episodes),
    sideBySide(run, at.iteration, chosen, episodes),
  ];
}

function iterationChoice(run, now) {
  const { iterations } = RUNS[run];
  const place = iterations.findIndex((one) => one.iteration === now);
  const go = (to) => iterations[to] && visit({ view: "groups", run, iteration: iterations[to].iteration });
  const select = el("select", { "aria-label": "Iteration", onchange: () => go(select.selectedIndex) },
    iterations.map((one) => el("option", { selected: one.iteration === now }, `iteration ${one.iteration}`)));
  return el("div", { class: "stepper" }, button("‹", () => go(place - 1), { "aria-label": "Earlier iteration", disabled: !place }),
    select, button("›", () => go(place + 1), { "aria-label": "Later iteration", disabled: place === iterations.length - 1 }));
}

function groupList(run, iteration, groups, chosen, episodes) {
  const rows = groups.map((group, place) => {
    const own = episodes.filter((episode) => episode.group === place);
    const solved = own.filter((episode) => episode.success).length;
    return { class: group === chosen ? "chosen" : "", cells: [
      link(line(group.task, 24), { view: "groups", run, iteration, task: group.task }, { "aria-current": group === chosen ? "true" : null }),
      el("span", { class: "dots", role: "img", "aria-label": `${solved} of ${own.length} solved` },
        own.map((episode) => el("span", { class: episode.success ? "dot on" : "dot" }))),
      `${solved} of ${own.length}`, number(meanOf(own.map((episode) => episode.reward))),
      number(group.difficulty, 0), teacherWords(group), gapCell(meanOf(own.map((episode) => episode.gap))),
    ] };
  });
  return table(`Groups of iteration ${iteration}`,
    ["task", "episodes", ">solved", ">reward", ">difficulty", "teacher", ">mean l"], rows);
}

/** Where the teacher's context comes from, or why there is none. */
function teacherWords(group) {
  if (!group.taught) return el("span", { class: "muted" }, foreign(group.untaught || "none"));
  if (group.skill !== null) return `skill ${group.skill}`;
  return group.context === "oracle" ? "reference solution" : "without a skill";
}

function sideBySide(run, iteration, group, episodes) {
  const own = episodes.filter((episode) => episode.task === group.task);
  const turns = Math.max(0, ...group.episodes.map((episode) => episode.turns.length));
  const most = 60;
  const head = el("tr", null, el("th", { scope: "col" }, "turn"), group.episodes.map((episode, member) =>
    el("th", { scope: "col" }, episodeLink({ run, iteration, task: group.task, member }, `episode ${member + 1}`))));
  const fact = (name, value) => el("tr", { class: "facts-row" }, el("th", { scope: "row" }, name),
    own.map((episode) => el("td", null, value(episode))));
  const rows = [];
  for (let turn = 0; turn < Math.min(turns, most); turn += 1) {
    rows.push(el("tr", null, el("th", { scope: "row" }, turn + 1), group.episodes.map((episode, member) => {
      const at = episode.turns[turn];
      if (!at) return el("td");
      const gap = turnGap(episode.tokens, at.tokens);
      return el("td", null, link(el("span", { class: `token ${shade(gap)}`, title: isNumber(gap) ? `l ${signed(gap)}` : "" },
        line(at.action, 24)), { view: "episode", run, iteration, task: group.task, member, turn: turn + 1 }));
    })));
  }
  const bestAdvantage = own.every((episode) => episode.advantage === 0);
  return el("section", { id: "group" }, el("h2", null, "Side by side: ", foreign(group.task)),
    group.context_text !== null && el("div", { class: "skill" }, el("h3", null, `In the ${group.taught ? "teacher's" : "student's"} prompt`), block(group.context_text)),
    bestAdvantage && el("p", { class: "note" }, "All rewards are equal: L_GRPO has no gradient here."),
    !group.applied && el("p", { class: "warning" }, "The step with this group was refused: its loss or gradient was not finite."),
    gapLegend(),
    el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Episodes of the group" },
      el("table", { class: "side" }, el("thead", null, head), el("tbody", null,
        fact("outcome", (episode) => outcome(episode.outcome)), fact("reward", (episode) => number(episode.reward)),
        fact("advantage", (episode) => signed(episode.advantage)), fact("turns", (episode) => count(episode.turns)),
        fact("mean l", (episode) => gapCell(episode.gap)), rows))),
    turns > most && el("p", { class: "note" }, `The first ${most} of up to ${turns} turns.`));
}
