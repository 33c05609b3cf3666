/* Tokens coloured by l = log π − log q: below 0 the teacher finds the token likelier than the student. */

const STEPS = [0.05, 0.25, 1, 3];

/** The class of a value of l: `up1` to `up4` where the teacher raises the token, `down1` to `down4` where it lowers it. */
function shade(gap) {
  if (!isNumber(gap)) return "none";
  const strength = STEPS.filter((step) => Math.abs(gap) >= step).length;
  return strength ? `${gap < 0 ? "up" : "down"}${strength}` : "same";
}

const meanOf = (values) => {
  const known = (values || []).filter(isNumber);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

/** The mean of l over a turn. */
const turnGap = (tokens, [from, to]) => meanOf(tokens.gap && tokens.gap.slice(from, to));

/** A turn's tokens. The whole text if the ids are unknown, as behind an endpoint. */
function tokenRow(episode, turn, { large } = {}) {
  const { tokens } = episode;
  const [from, to] = turn.tokens;
  if (from === to) return block(turn.action, { class: `text tokens ${large ? "large" : ""}` });
  const row = el("pre", { class: `text tokens ${large ? "large" : ""}`, dir: "auto" });
  const most = 1500;
  const add = (begin, end) => {
    for (let at = begin; at < end; at += 1) row.append(token(tokens, at, large));
  };
  add(from, Math.min(to, from + most));
  if (to - from > most) {
    const more = button(`show all ${count(to - from)} tokens`, () => {
      more.remove();
      add(from + most, to);
    });
    row.append(more);
  }
  return row;
}

function token(tokens, at, large) {
  const gap = tokens.gap ? tokens.gap[at] : null;
  const clipped = tokens.clipped && tokens.clipped[at] ? " clipped" : "";
  const text = tokens.text[at];
  return el("span", {
    class: `token ${shade(gap)}${clipped}`, "data-at": at, tabIndex: large ? 0 : -1,
    "aria-label": large ? `${text.trim() || "blank"}: ${tokenFacts(tokens, at).map((pair) => pair.join(" ")).join(", ")}` : null,
    role: large ? "note" : null,
  }, text === "" ? el("span", { class: "invisible", title: `token ${tokens.id[at]}` }, "∅") : visible(text));
}

/** What is known of a token, as pairs of a name and a text. */
function tokenFacts(tokens, at) {
  const of = (name) => (tokens[name] ? tokens[name][at] : null);
  const chance = (logprob) => (isNumber(logprob) ? `${(100 * Math.exp(logprob)).toPrecision(3)} %` : "–");
  const gap = of("gap");
  const pairs = [["token", `${JSON.stringify(tokens.text[at])} (id ${tokens.id[at]})`]];
  pairs.push(["student", chance(of("student"))]);
  if (tokens.teacher) pairs.push(["teacher", chance(of("teacher"))]);
  pairs.push(["when sampled", chance(of("old"))]);
  if (tokens.gap) {
    const words = !isNumber(gap) ? "not finite" : Math.abs(gap) < STEPS[0] ? "as likely for the teacher"
      : gap < 0 ? "▲ likelier for the teacher" : "▼ less likely for the teacher";
    pairs.push(["l", `${signed(gap, 3)} ${words}`]);
  } else pairs.push(["teacher", "none for this group"]);
  if (tokens.ratio) pairs.push(["ρ", number(of("ratio"), 3)]);
  if (tokens.clipped) pairs.push(["reward's gradient", of("clipped") ? "clipped to 0" : "kept"]);
  if (tokens.divergence) pairs.push(["ρ (e^−l − 1 + l)", number(of("divergence"), 4)]);
  if (tokens.share) pairs.push(["share of the loss", isNumber(of("share")) ? of("share").toExponential(2) : "–"]);
  return pairs;
}

/** Every token of a turn as a table: the same as on hover, for keyboards, screen readers and copying. */
function tokenTable(episode, [from, to]) {
  const { tokens } = episode;
  const rows = [];
  const chance = (name, at) => (tokens[name] && isNumber(tokens[name][at]) ? `${(100 * Math.exp(tokens[name][at])).toFixed(2)} %` : "–");
  const value = (name, at, digits) => (tokens[name] ? number(tokens[name][at], digits) : "–");
  for (let at = from; at < Math.min(to, from + 400); at += 1) {
    rows.push({ cells: [
      foreign(JSON.stringify(tokens.text[at])), chance("student", at), chance("teacher", at), chance("old", at),
      tokens.gap ? signed(tokens.gap[at], 3) : "–", value("ratio", at, 3),
      tokens.clipped ? (tokens.clipped[at] ? "clipped" : "kept") : "–", value("divergence", at, 4),
      tokens.share && isNumber(tokens.share[at]) ? tokens.share[at].toExponential(2) : "–",
    ] });
  }
  const columns = ["token", ">student", ">teacher", ">when sampled", ">l", ">ρ", "gradient", ">L_SDL", ">share of loss"];
  return [table("Tokens of this turn", columns, rows), to - from > 400 && el("p", { class: "note" }, `The first 400 of ${count(to - from)} tokens.`)];
}

/** Show a token's values where the pointer or the focus is. */
function watchTokens(element, tokens) {
  const show = (event) => {
    const found = event.target.closest(".token");
    if (!found) return hideTip();
    const { left, bottom } = found.getBoundingClientRect();
    return showTip(tokenFacts(tokens, Number(found.dataset.at)), event.clientX || left, event.clientY || bottom);
  };
  element.addEventListener("pointermove", show);
  element.addEventListener("focusin", show);
  element.addEventListener("click", show);
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("focusout", hideTip);
  return element;
}

function gapLegend() {
  const steps = [["up4", "▲ teacher finds it much likelier"], ["up2", "▲ likelier"], ["same", "alike"], ["down2", "▼ less likely"], ["down4", "▼ much less likely"]];
  return el("p", { class: "gap-legend" }, steps.map(([name, text]) => el("span", { class: `token ${name}` }, text)),
    el("span", { class: "note" }, "l = log π(student) − log q(teacher)"));
}
