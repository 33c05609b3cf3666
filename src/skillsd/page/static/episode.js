/* View 4: an episode turn by turn, what the teacher made of each token, and what the teacher was given. */

async function episodeView(at) {
  const { run } = at;
  const all = episodesOf(run);
  if (!all.length) return [el("h1", null, "Episode"), noEpisodes(run)];
  const wanted = all.find((one) => one.iteration === at.iteration && one.task === at.task && one.member === at.member);
  if (!wanted && at.task) {
    return [el("h1", null, "Episode"), el("p", { class: "empty" }, "Episode ", foreign(`${at.iteration}/${at.task}/${at.member}`),
      ` is not in this report. ${RUNS[run].sampling}`)];
  }
  const index = wanted || all.find((one) => one.gap !== null) || all[0];
  const { chunk: name } = RUNS[run].iterations.find((one) => one.iteration === index.iteration);
  const group = (await chunk(name)).groups[index.group];
  const episode = group.episodes[index.member];
  const last = episode.turns.length;
  const turn = at.turn === null ? Math.min(1, last) : Math.min(Math.max(0, at.turn), last);
  return [
    episodeTitle(index, group),
    el("div", { class: "chips" }, outcome(index.outcome), chip("reward", number(index.reward)), chip("advantage", signed(index.advantage)),
      chip("turns", count(index.turns)), chip("tokens", count(index.tokens)),
      isNumber(index.gap) && chip("mean l", gapCell(index.gap)), chip("seed", episode.seed)),
    episode.error && el("p", { class: "warning" }, foreign(episode.error)),
    !group.applied && el("p", { class: "warning" }, "The step with this group was refused: its loss or gradient was not finite."),
    el("div", { class: "turn", id: "turn" }, turnPanel(index, group, episode, turn)),
    el("div", { class: "halves" },
      section("Turns", "Each bar is a turn's mean l: up, the teacher would rather do it; down, rather not.",
        gapBars(index, episode, turn), transcript(index, episode, turn)),
      section("What the teacher was given", null, teacherPrompt(group, index))),
  ];
}

const chip = (name, value) => el("span", { class: "chip" }, el("span", { class: "muted" }, name, " "), value);

function episodeTitle(index, group) {
  const { run, iteration, task, member } = index;
  const step = (by) => stepEpisode(index, by);
  return el("div", { class: "title" },
    el("h1", null, `Episode ${member + 1}`, el("span", { class: "muted" }, ` of ${group.episodes.length}`)),
    el("nav", { class: "crumbs", "aria-label": "Where this is" },
      link(`iteration ${iteration}`, { view: "groups", run, iteration }), " / ",
      link(line(task, 40), { view: "groups", run, iteration, task })),
    el("div", { class: "stepper" }, button("‹", () => step(-1), { "aria-label": "Previous episode (k)" }),
      el("span", null, "episode"), button("›", () => step(1), { "aria-label": "Next episode (j)" })));
}

/** Go to another episode of the run, in the order of the report. */
function stepEpisode(index, by) {
  const all = episodesOf(index.run);
  const next = all[all.indexOf(index) + by];
  if (next) visit({ view: "episode", run: next.run, iteration: next.iteration, task: next.task, member: next.member });
}

function turnPanel(index, group, episode, turn) {
  const last = episode.turns.length;
  const now = turn ? episode.turns[turn - 1] : null;
  const go = (to) => visit({ view: "episode", ...placeOf(index), turn: Math.min(Math.max(0, to), last) }, true);
  const slider = el("input", { type: "range", min: 0, max: last, value: turn, "aria-label": "Turn", oninput: () => go(Number(slider.value)) });
  slider.value = turn;
  const picture = drawn(now ? now.picture : episode.picture);
  return [
    el("h2", { class: "hidden" }, turn ? `Turn ${turn}` : "Start"),
    el("div", { class: "scrubber" }, button("‹", () => go(turn - 1), { "aria-label": "Previous turn (left arrow)", disabled: turn === 0 }), slider,
      button("›", () => go(turn + 1), { "aria-label": "Next turn (right arrow)", disabled: turn === last }),
      el("span", { class: "count", role: "status" }, turn ? `turn ${turn} of ${last}` : `start, ${plural(last, "turn")}`)),
    el("div", { class: picture ? "panes" : "panes single" },
      picture && el("div", { class: "pane" }, picture),
      el("div", { class: "pane" }, now ? action(episode, now) : prompts(episode))),
  ];
}

const placeOf = ({ run, iteration, task, member }) => ({ run, iteration, task, member });

function action(episode, turn) {
  const [from, to] = turn.tokens;
  const gap = turnGap(episode.tokens, turn.tokens);
  const isCode = turn.picture && turn.picture.kind === "code";
  return [
    el("h3", null, "Action", isNumber(gap) && [" ", el("span", { class: "note" }, "mean l "), gapCell(gap)]),
    watchTokens(tokenRow(episode, turn, { large: to - from <= 16 }), episode.tokens),
    to > from && gapLegend(),
    to === from && el("p", { class: "note" }, "The ids of the tokens are unknown: the model is behind an endpoint."),
    to > from && el("details", null, el("summary", null, "All tokens of this turn"), tokenTable(episode, turn.tokens)),
    !isCode && [el("h3", null, "Observation"), block(turn.observation)],
  ];
}

function prompts(episode) {
  return [el("h3", null, "The student's prompt"), episode.prompt.map((message) =>
    el("div", { class: "message" }, el("span", { class: "role" }, message.role), block(message.content)))];
}

/** A bar per turn: the mean of l, upwards where the teacher would rather do it. */
function gapBars(index, episode, now) {
  const gaps = episode.turns.map((turn) => turnGap(episode.tokens, turn.tokens));
  if (!gaps.some(isNumber)) return el("p", { class: "empty" }, "No teacher scored this episode.");
  const top = Math.max(0.5, ...gaps.filter(isNumber).map(Math.abs));
  const wide = Math.max(gaps.length, 12);
  const bars = gaps.map((gap, place) => {
    const height = isNumber(gap) ? (34 * Math.abs(gap)) / top : 0;
    const bar = svg("rect", { class: `bar ${shade(gap)}`, x: place + 0.1, width: 0.8, y: gap < 0 ? 36 - height : 36, height: Math.max(height, 0.5) });
    const target = svg("rect", { class: place + 1 === now ? "hit now" : "hit", x: place, width: 1, y: 0, height: 72 },
      svg("title", null, `turn ${place + 1}: l ${signed(gap)}`));
    target.addEventListener("click", () => visit({ view: "episode", ...placeOf(index), turn: place + 1 }, true));
    return [target, bar];
  });
  return svg("svg", { class: "gap-bars", viewBox: `0 0 ${wide} 72`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Mean l by turn: ${gaps.map((gap, place) => `${place + 1}: ${signed(gap)}`).slice(0, 40).join(", ")}` },
  bars, svg("line", { class: "axis", x1: 0, x2: wide, y1: 36, y2: 36 }));
}

function transcript(index, episode, now) {
  const most = 200;
  const rows = episode.turns.slice(0, most).map((turn, place) => {
    const gap = turnGap(episode.tokens, turn.tokens);
    const chosen = place + 1 === now;
    return el("li", { class: chosen ? "chosen" : "", "aria-current": chosen ? "step" : null },
      link(place + 1, { view: "episode", ...placeOf(index), turn: place + 1 }, { class: "number", "aria-label": `turn ${place + 1}` }),
      el("div", null, shortTokens(episode, turn), el("div", { class: "seen" }, line(turn.observation, 90))),
      el("span", { class: "num" }, gapCell(gap)));
  });
  return [watchTokens(el("ol", { class: "transcript" }, rows), episode.tokens),
    episode.turns.length > most && el("p", { class: "note" }, `The first ${most} of ${episode.turns.length} turns; the slider shows all.`)];
}

/** The first tokens of a turn, for the list. */
function shortTokens(episode, turn) {
  const [from, to] = turn.tokens;
  const shown = tokenRow(episode, to - from > 24 ? { ...turn, tokens: [from, from + 24] } : turn);
  if (to - from > 24) shown.append("…");
  return from === to ? line(turn.action, 90) : shown;
}

function teacherPrompt(group, index) {
  const lengths = `${count(group.student_prompt_tokens)} tokens for the student`;
  if (group.difference === null) {
    const why = group.untaught || "the method has no teacher";
    return [el("p", { class: "empty" }, "This group had no teacher: ", foreign(why), "."),
      el("p", { class: "note" }, lengths), block(group.student_prompt)];
  }
  const parts = { "=": (text) => visible(text), "+": (text) => el("ins", null, visible(text)), "-": (text) => el("del", null, visible(text)) };
  const long = group.difference.some(([, text]) => text.length > CUT);
  const shown = el("pre", { class: "text diff", dir: "auto" });
  const fill = (whole) => shown.replaceChildren(...group.difference.flatMap(([kind, text]) =>
    [parts[kind](whole || text.length <= CUT ? text : `${text.slice(0, CUT / 2)} … ${text.slice(-CUT / 2)}`)].flat()));
  fill(false);
  return [
    el("p", { class: "note" }, `${lengths}, ${count(group.teacher_prompt_tokens)} for the teacher. `,
      el("ins", null, "Added for the teacher"), group.difference.some(([kind]) => kind === "-") && [", ", el("del", null, "left out for it")], ".",
      group.skill !== null && [" From ", link(`skill ${group.skill}`, { view: "skills", run: index.run, task: index.task }), "."]),
    shown,
    long && button("show the whole prompt", (event) => {
      fill(true);
      event.target.remove();
    }),
  ];
}
