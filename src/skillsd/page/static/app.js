/* The page: its head, the views by address, keys, and light or dark. */

const VIEWS = {
  overview: ["Overview", overviewView], curves: ["Curves", curvesView], groups: ["Groups", groupsView],
  episode: ["Episode", episodeView], skills: ["Skills", skillsView], search: ["Search", searchView],
};
const KEYS = [
  ["1 … 6", "the views"], ["← →", "previous, next turn"], ["j k", "next, previous episode"], ["/", "search"],
  ["t", "light or dark"], ["?", "these keys"],
];
const settings = { cost: "episodes", overlay: true };
const main = document.getElementById("main");

/** Go to a place; `quietly`: without an entry in the history and without scrolling. */
function visit(target, quietly) {
  if (quietly) {
    history.replaceState(null, "", href(target));
    render({ still: true });
  } else location.hash = href(target);
}

let rendering = 0;

async function render({ still } = {}) {
  const mine = (rendering += 1);
  const at = place();
  const view = VIEWS[at.view] ? at.view : "overview";
  let content;
  try {
    content = await VIEWS[view][1](at);
  } catch (error) {
    console.error(error);
    content = el("p", { class: "warning" }, "This part of the report could not be shown: ", foreign(String(error)));
  }
  if (mine !== rendering) return; // another view was asked for meanwhile
  hideTip();
  const focused = still && document.activeElement && document.activeElement.getAttribute("aria-label");
  main.replaceChildren(...[content].flat(4).filter(Boolean));
  main.dataset.view = view;
  if (focused) [...main.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
  head(view, at.run);
  document.title = `${VIEWS[view][0]} · ${DATA.title} · skillsd`;
  drawCharts();
  if (!still) scrollTo(0, 0);
  document.body.dataset.ready = location.hash || "#overview"; // for the tests: what is shown
}

function head(view, run) {
  const tabs = Object.entries(VIEWS).map(([name, [text]]) =>
    link(text, { view: name, run }, { "aria-current": name === view ? "page" : null }));
  const choice = RUNS.length > 1 && el("select", { "aria-label": "Run", onchange: () => visit({ view: view === "episode" ? "groups" : view, run: choice.selectedIndex }) },
    RUNS.map((one, at) => el("option", { selected: at === run }, RUNS.every((other) => other.model === one.model) ? one.label : `${one.model}: ${one.label}`)));
  document.getElementById("top").replaceChildren(
    el("div", { class: "bar" },
      el("a", { class: "name", href: "#overview" }, "skillsd", el("span", { class: "muted" }, " / "), foreign(DATA.title)),
      el("nav", { "aria-label": "Views", class: "tabs" }, tabs),
      el("div", { class: "tools" }, choice,
        button(isDark() ? "☀" : "☾", switchTheme, { "aria-label": isDark() ? "Light colours" : "Dark colours", title: "Light or dark (t)" }),
        button("?", () => help.showModal(), { "aria-label": "Keys", title: "Keys (?)" }))),
    reloading());
}

// -- while the run goes on ------------------------------------------------------------------------------------------

function reloading() {
  if (!DATA.running) return [];
  const text = `Written ${DATA.written}, ${DATA.is_table ? "while the table is being made" : RUNS[0].state.text}.`;
  return el("p", { class: "banner", role: "status" }, text, DATA.reload ? ` This page loads itself anew every ${DATA.reload} s.` : " Write it again to see more: skillsd report, or with --watch.");
}

if (DATA.reload) {
  setInterval(() => {
    // Not while somebody reads a dialog or types.
    if (!document.hidden && !help.open && document.activeElement?.tagName !== "INPUT") location.reload();
  }, 1000 * DATA.reload);
}

// -- light and dark -------------------------------------------------------------------------------------------------

const system = matchMedia("(prefers-color-scheme: dark)");

function stored(value) {
  try { // a page that was opened from a file may have no storage
    if (value) localStorage.setItem("skillsd-theme", value);
    return localStorage.getItem("skillsd-theme");
  } catch {
    return null;
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

function switchTheme() {
  setTheme(isDark() ? "light" : "dark");
  stored(document.documentElement.dataset.theme);
  render({ still: true });
}

system.addEventListener("change", () => {
  if (stored()) return;
  setTheme(system.matches ? "dark" : "light");
  render({ still: true });
});

// -- keys -----------------------------------------------------------------------------------------------------------

const help = el("dialog", { "aria-label": "Keys" }, el("h2", null, "Keys"),
  el("dl", { class: "figures" }, KEYS.map(([keys, what]) => [el("dt", null, keys), el("dd", null, what)])),
  el("p", { class: "note" }, "Every place has its own address: copy it to point somebody to an episode."),
  el("form", { method: "dialog" }, el("button", null, "Close")));

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") hideTip();
  if (typing && !(event.target.type === "range")) return;
  const at = place();
  const views = Object.keys(VIEWS);
  const act = {
    "?": () => help.showModal(), t: switchTheme,
    "/": async () => {
      if (at.view !== "search") visit({ view: "search", run: at.run });
      await until(() => document.getElementById("query"));
      document.getElementById("query")?.focus();
    },
    ArrowLeft: () => at.view === "episode" && turnBy(-1),
    ArrowRight: () => at.view === "episode" && turnBy(1),
    j: () => at.view === "episode" && episodeBy(1),
    k: () => at.view === "episode" && episodeBy(-1),
  }[event.key] || (views[Number(event.key) - 1] && (() => visit({ view: views[Number(event.key) - 1], run: at.run })));
  if (!act) return;
  if (act() !== false) event.preventDefault();
}

const clickOn = (label) => [...main.querySelectorAll("button")].find((one) => one.getAttribute("aria-label")?.startsWith(label))?.click();
const turnBy = (by) => clickOn(by > 0 ? "Next turn" : "Previous turn");
const episodeBy = (by) => clickOn(by > 0 ? "Next episode" : "Previous episode");

async function until(condition) {
  for (let tries = 0; tries < 50 && !condition(); tries += 1) await new Promise((done) => setTimeout(done, 20));
}

// -- begin ----------------------------------------------------------------------------------------------------------

setTheme(stored() || (system.matches ? "dark" : "light"));
document.body.append(tip, help);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", () => render());
addEventListener("keydown", onKey);
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(drawCharts, 150);
});
render();
