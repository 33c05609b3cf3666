/* Charts by Vega-Lite, in the page's colours, with its expressions interpreted: `eval` is forbidden here. */

const COLOURS = ["#4269d0", "#c77b0a", "#2f8a5b", "#c4407c", "#7d58c2", "#0e8a9e", "#a0522d", "#6b7280"];
const DARK = ["#86a5f5", "#efb45a", "#62c493", "#f08bb8", "#b79bf0", "#5cc5d8", "#d99a73", "#aab2bd"];
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]];

const isDark = () => document.documentElement.dataset.theme === "dark";
const colours = () => (isDark() ? DARK : COLOURS);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const shownCharts = new Set();

/**
 * A chart that fills its element's width.
 * @param spec Vega-Lite, without width and config.
 * @param label what it shows, in words, for people who don't see it.
 */
function chart(spec, label, height = 190) {
  const made = el("div", { class: "chart" });
  made.draw = () => {
    if (!made.isConnected || !made.clientWidth) return;
    if (made.view) made.view.finalize();
    const whole = { ...spec, description: label, width: made.clientWidth, height, autosize: { type: "fit", contains: "padding" } };
    const compiled = vegaLite.compile(whole, { config: config() }).spec;
    made.view = new vega.View(vega.parse(compiled, null, { ast: true }), {
      expr: vegaInterpreter.expression, renderer: "svg", logLevel: vega.Error, loader: nothing,
    });
    made.replaceChildren();
    made.view.tooltip(tooltip).initialize(made).run();
    const drawn = made.querySelector("svg");
    if (drawn) drawn.setAttribute("aria-hidden", "true");
  };
  shownCharts.add(made);
  return made;
}

/** Loads nothing: the page makes no requests. */
const nothing = { load: () => Promise.reject(new Error("off")), sanitize: () => Promise.reject(new Error("off")) };

function drawCharts() {
  for (const made of [...shownCharts]) {
    if (!made.isConnected) {
      if (made.view) made.view.finalize();
      shownCharts.delete(made);
    } else made.draw();
  }
}

function config() {
  const [ink, muted, rule] = ["ink", "muted", "line"].map(variable);
  return {
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: {
      labelColor: muted, titleColor: muted, gridColor: rule, domainColor: rule, tickColor: rule, labelFontSize: 11,
      titleFontSize: 11, titleFontWeight: "normal", gridOpacity: 0.8, tickCount: 5, labelFlush: true, titlePadding: 6,
    },
    axisX: { grid: false },
    axisY: { domain: false, ticks: false },
    legend: { labelColor: ink, titleColor: muted, labelFontSize: 12, symbolStrokeWidth: 3 },
    range: { category: colours() },
  };
}

// -- the tooltip of charts and tokens -------------------------------------------------------------------------------

const tip = el("div", { class: "tip", role: "tooltip", id: "tip", hidden: true });

function tooltip(handler, event, item, value) {
  if (!value) {
    hideTip();
    return;
  }
  const pairs = Object.entries(typeof value === "object" ? value : { "": value });
  showTip(pairs.map(([name, text]) => [name, String(text)]), event.clientX, event.clientY);
}

/** Show pairs of a name and a text at a point of the window. */
function showTip(pairs, x, y) {
  tip.replaceChildren(el("dl", null, pairs.map(([name, text]) => [el("dt", null, name), el("dd", null, foreign(text))])));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
}

function hideTip() {
  tip.hidden = true;
}

// -- lines over a run -----------------------------------------------------------------------------------------------

/**
 * Lines of one metric: every run, and the mean of a method with its interval.
 * @param lines of {name, method, rows: [{x, y, low, high}], strength: "mean" | "run" | "only"}
 */
function lineChart(lines, { label, x, y, percent: isPercent, log, base, height }) {
  const methods = [...new Set(lines.map((of) => of.method))];
  const values = lines.flatMap((of) => of.rows.filter((row) => isNumber(row.y)).map((row) => ({
    ...row, name: of.name, method: of.method, strength: of.strength,
  })));
  if (!values.length) return el("p", { class: "empty" }, "not measured in this run");
  const format = isPercent ? ".3~p" : log ? ".0e" : ".4~g";
  const scale = log ? { type: "symlog", constant: smallest(values) } : { zero: Boolean(isPercent), nice: true };
  const colour = { field: "method", type: "nominal", legend: null, scale: { domain: methods, range: colours() } };
  const shape = { field: "method", type: "nominal", legend: null, scale: { domain: methods, range: DASHES } };
  const axes = {
    x: { field: "x", type: "quantitative", title: x, axis: { format: ".3~s" } },
    y: { field: "y", type: "quantitative", title: y || null, scale, axis: { format } },
  };
  const tips = [
    { field: "name", title: "run" },
    { field: "x", title: x, format: ",.0f" },
    { field: "y", title: label, format: isPercent ? ".1%" : ".4~g" },
  ];
  const few = Math.max(...lines.map((one) => one.rows.length)) <= 60;
  const of = (...strengths) => strengths.map((one) => `datum.strength === "${one}"`).join(" || ");
  const encoding = { ...axes, color: colour, detail: { field: "name" } };
  const layers = [
    {
      transform: [{ filter: "isValid(datum.low) && isValid(datum.high)" }, { filter: of("mean", "only") }],
      mark: { type: "area", opacity: 0.15 },
      encoding: { ...encoding, y: { ...axes.y, field: "low" }, y2: { field: "high" } },
    },
    {
      transform: [{ filter: of("run") }],
      mark: { type: "line", opacity: 0.35, strokeWidth: 1 },
      encoding: { ...encoding, strokeDash: shape },
    },
    {
      transform: [{ filter: of("mean", "only") }],
      mark: { type: "line", strokeWidth: 2.2 },
      encoding: { ...encoding, strokeDash: shape },
    },
    {
      mark: { type: "point", filled: true, size: 30 },
      encoding: { ...encoding, tooltip: tips, opacity: {
        condition: { test: few ? 'datum.strength !== "run"' : "false", value: 1 }, value: 0 } },
    },
  ];
  if (isNumber(base)) {
    layers.unshift({ data: { values: [{ y: base }] }, mark: { type: "rule", strokeDash: [4, 4], color: variable("muted") },
      encoding: { y: { field: "y", type: "quantitative" } } });
  }
  return chart({ data: { values }, layer: layers }, spoken(label, lines, isPercent), height);
}

const smallest = (values) => Math.min(...values.map((v) => Math.abs(v.y)).filter((v) => v > 0), 1e-3);

/** A chart in words: where its lines begin and end. */
function spoken(label, lines, isPercent) {
  const shown = (value) => (isPercent ? percent(value) : number(value, 3));
  const words = lines.filter((of) => of.strength !== "run").map((of) => {
    const known = of.rows.filter((row) => isNumber(row.y));
    return known.length ? `${of.name} from ${shown(known[0].y)} to ${shown(known.at(-1).y)}` : null;
  });
  return `${label}: ${words.filter(Boolean).slice(0, 8).join("; ")}`;
}

/** A small legend for the methods of `lineChart`. */
function legend(methods) {
  return el("ul", { class: "legend" }, methods.map((method, place) => el("li", null,
    svg("svg", { viewBox: "0 0 28 8", class: "swatch", "aria-hidden": "true" },
      svg("line", { class: `series s${place % COLOURS.length}`, x1: 0, x2: 28, y1: 4, y2: 4,
        "stroke-dasharray": DASHES[place % DASHES.length].join(" ") })), method)));
}
