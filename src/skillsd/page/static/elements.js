/* Elements from data. Every text becomes a text node: nothing that a model or an environment wrote is read as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** An element; `properties` are DOM properties, except `class`, `on...` handlers, and names with a dash (attributes). */
function el(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** An SVG element with attributes. */
function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children.flat(3).filter(Boolean));
  return made;
}

function button(text, action, properties) {
  return el("button", { type: "button", onclick: action, ...properties }, text);
}

function link(text, target, properties) {
  return el("a", { href: href(target), ...properties }, text);
}

/** A section with a heading; `note` is a line below it. */
function section(title, note, ...children) {
  return el("section", null, el("h2", null, title), note && el("p", { class: "note" }, note), children);
}

/** A table; columns that begin with ">" are numbers. */
function table(caption, columns, rows) {
  const isNumber = columns.map((column) => column.startsWith(">"));
  const head = columns.map((column, place) =>
    el("th", { scope: "col", class: isNumber[place] && "num" }, column.replace(/^>/, "")));
  const body = rows.map((row) =>
    el("tr", { class: row.class }, row.cells.map((cell, place) =>
      el("td", { class: isNumber[place] && "num" }, cell))));
  return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": caption },
    el("table", null, el("caption", { class: "hidden" }, caption),
      el("thead", null, el("tr", null, head)), el("tbody", null, body)));
}

// -- foreign text ---------------------------------------------------------------------------------------------------

/* Control characters but tab and line feed; marks that change the direction of text; characters without width. */
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const CUT = 4000;

/** Text of a model or an environment, isolated from its surroundings, with what is invisible made visible. */
function foreign(text, properties) {
  return el("bdi", properties, visible(String(text)));
}

function visible(text) {
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(INVISIBLE)) {
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(text.slice(end, found.index), el("span", { class: "invisible", title: `U+${code}` }, code));
    end = found.index + 1;
  }
  return [...parts, text.slice(end)];
}

/** A block of such text; a long one is cut, with a button that shows all of it. */
function block(text, properties) {
  text = String(text);
  const made = el("pre", { class: "text", dir: "auto", ...properties });
  if (text.length <= CUT) {
    made.append(...visible(text));
  } else {
    const more = button(`show all ${count(text.length)} characters`, () => made.replaceChildren(...visible(text)));
    made.append(...visible(text.slice(0, CUT)), "… ", more);
  }
  return made;
}

/** The beginning of such a text, on one line. */
function line(text, width = 80) {
  const short = String(text).slice(0, width * 4).replace(/\s+/g, " ").trim();
  return foreign(short.length > width ? `${short.slice(0, width)}…` : short, { class: "line" });
}

// -- numbers --------------------------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const count = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en") : "–");
const percent = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)} %` : "–");
const number = (value, digits = 2) => (isNumber(value) ? value.toFixed(digits).replace(/^-(?=[0.]+$)/, "").replace("-", "−") : "–");
const signed = (value, digits = 2) => (isNumber(value) ? `${Number(value.toFixed(digits)) > 0 ? "+" : ""}${number(value, digits)}` : "–");
const range = (pair) => (pair ? `[${(100 * pair[0]).toFixed(1)}, ${(100 * pair[1]).toFixed(1)}]` : "");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
}

/** A small picture of an interval in [0, 1]: a line with its mean as a dot. */
function intervalBar(mean, interval, label, max = 1) {
  const x = (value) => 2 + 116 * Math.min(1, Math.max(0, value / max));
  return svg("svg", { class: "interval", viewBox: "0 0 120 14", role: "img", "aria-label": label },
    svg("line", { class: "axis", x1: 2, x2: 118, y1: 7, y2: 7 }),
    interval && svg("line", { class: "reach", x1: x(interval[0]), x2: x(interval[1]), y1: 7, y2: 7 }),
    isNumber(mean) && svg("circle", { class: "dot", cx: x(mean), cy: 7, r: 4 }));
}
