/* The report's data: the light part, and the chunks, which are decompressed when they are opened. */

const DATA = JSON.parse(document.getElementById("light").textContent);
const RUNS = DATA.runs;
const opened = new Map();

/** The content of an iteration: a promise. */
function chunk(name) {
  if (!opened.has(name)) {
    if (opened.size > 20) opened.delete(opened.keys().next().value);
    opened.set(name, unpack(document.getElementById(`chunk-${name}`).textContent));
  }
  return opened.get(name);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** The episodes of a run's index, as objects. */
const episodesOf = (() => {
  const made = new Map();
  return (run) => {
    if (!made.has(run)) {
      const { tasks, outcomes, ...columns } = RUNS[run].episodes;
      made.set(run, columns.iteration.map((_, row) => {
        const episode = { run };
        for (const name of Object.keys(columns)) episode[name] = columns[name][row];
        episode.task = tasks[episode.task];
        episode.outcome = outcomes[episode.outcome];
        return episode;
      }));
    }
    return made.get(run);
  };
})();

/** The skills of a run's bank, as objects. */
const skillsOf = (() => {
  const made = new Map();
  return (run) => {
    if (!made.has(run)) {
      const columns = RUNS[run].skills ? RUNS[run].skills.columns : { id: [] };
      made.set(run, columns.id.map((_, row) =>
        Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[row]]))));
    }
    return made.get(run);
  };
})();

/** The rows of columns, as objects. */
function rowsOf(columns) {
  const names = Object.keys(columns);
  return names.length ? columns[names[0]].map((_, row) => {
    const made = {};
    for (const name of names) made[name] = columns[name][row];
    return made;
  }) : [];
}

// -- where one is ---------------------------------------------------------------------------------------------------

/** The place that the address names: `view`, and what it shows. */
function place() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const [view, what] = [...hash][0] || ["overview", ""];
  const run = Math.min(Math.max(0, Number(hash.get("run")) || 0), RUNS.length - 1);
  const parts = what.split("/").map(decodePart);
  const found = { view, run, what, turn: hash.has("turn") ? Number(hash.get("turn")) || 0 : null };
  if (view === "groups" || view === "episode") {
    found.iteration = parts[0] ? Number(parts[0]) : null;
    found.task = parts[1] || null;
    found.member = Number(parts[2]) || 0;
  }
  if (view === "skills") found.task = parts[0] || null;
  if (view === "search") found.query = Object.fromEntries([...hash].slice(1));
  return found;
}

const decodePart = (text) => {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
};

/** The address of a place: `#episode=3/TASK/2&turn=5&run=1`. */
function href({ view, iteration, task, member, turn, run, query }) {
  const parts = view === "skills" ? [task] : [iteration, task, member];
  const what = parts.filter((part) => part !== null && part !== undefined)
    .map((part) => encodeURIComponent(part)).join("/");
  const more = { ...(turn ? { turn } : {}), ...(run ? { run } : {}), ...(query || {}) };
  const rest = Object.entries(more).map(([name, value]) => `&${name}=${encodeURIComponent(value)}`).join("");
  return `#${view}${what || rest ? "=" : ""}${encodeURIComponent(what)}${rest}`.replaceAll("%2F", "/");
}

/** A link to an episode of the index. */
const episodeLink = ({ run, iteration, task, member }, text, properties) =>
  link(text, { view: "episode", run, iteration, task, member }, properties);
