/* The environment's own picture of a state: a board, code with its output, or text. */

const SHAPES = {
  wall: (x, y) => [svg("rect", { class: "wall", x, y, width: 1, height: 1 })],
  floor: () => [],
  target: (x, y) => [svg("circle", { class: "target", cx: x + 0.5, cy: y + 0.5, r: 0.17 }),
    svg("circle", { class: "target-ring", cx: x + 0.5, cy: y + 0.5, r: 0.3 })],
  box: (x, y) => [svg("rect", { class: "box", x: x + 0.14, y: y + 0.14, width: 0.72, height: 0.72, rx: 0.08 }),
    svg("path", { class: "box-mark", d: `M${x + 0.28} ${y + 0.28}l.44 .44m0 -.44l-.44 .44` })],
  "box on target": (x, y) => [svg("rect", { class: "box done", x: x + 0.14, y: y + 0.14, width: 0.72, height: 0.72, rx: 0.08 }),
    svg("path", { class: "box-mark", d: `M${x + 0.27} ${y + 0.52}l.16 .16l.3 -.34` })],
  player: (x, y) => [svg("circle", { class: "player", cx: x + 0.5, cy: y + 0.34, r: 0.16 }),
    svg("path", { class: "player", d: `M${x + 0.22} ${y + 0.84}a.28 .3 0 0 1 .56 0z` })],
  "player on target": (x, y) => [...SHAPES.target(x, y), ...SHAPES.player(x, y)],
};

/** The picture as an element; null without one. */
function drawn(picture) {
  if (!picture) return null;
  const made = { grid: board, code: codeAndOutput, text: (of) => block(of.text) }[picture.kind];
  if (!made) return null;
  return el("figure", { class: `picture ${picture.kind}` }, made(picture),
    picture.caption && el("figcaption", null, foreign(picture.caption)));
}

function board({ rows, legend: names = {} }) {
  const width = Math.max(1, ...rows.map((row) => [...row].length));
  const cells = [];
  const seen = new Map();
  rows.forEach((row, y) => [...row].forEach((symbol, x) => {
    const name = names[symbol] || symbol;
    const shape = Object.hasOwn(SHAPES, name) ? SHAPES[name](x, y) : [svg("text", { class: "glyph", x: x + 0.5, y: y + 0.75 }, symbol)];
    cells.push(...shape);
    if (name.trim() && !["wall", "floor"].includes(name)) seen.set(name, [...(seen.get(name) || []), `row ${y}, column ${x}`]);
  }));
  const words = [...seen].map(([name, where]) => `${name} at ${where.slice(0, 6).join(" and ")}`).join("; ");
  return svg("svg", { class: "board", viewBox: `0 0 ${width} ${rows.length}`, role: "img", "aria-label": `Board: ${words}`,
    "data-columns": Math.min(width, 30) }, svg("rect", { class: "ground", x: 0, y: 0, width, height: rows.length }), cells);
}

function codeAndOutput({ input, output, error }) {
  const part = (title, text, properties) => text && el("div", properties, el("h4", null, title), block(text));
  return el("div", null, part("Code", input, { class: "code" }), part("Output", output, { class: "output" }),
    part("Error", error, { class: "error" }));
}
