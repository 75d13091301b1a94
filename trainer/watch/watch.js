"use strict";
// What comes from a run folder (names, prompts, keys of numbers) becomes text, never markup: the page's policy allows nothing else.

const $ = (id) => document.getElementById(id);
const FAST_MS = 2000, SLOW_MS = 10000, AWAY_MS = 5000; // between questions: while a run goes on, when all is still, when nobody answers
const runs = new Map(); // id -> { brief, whole, train, evals, colour, shown, step of the grid that was chosen }
const drawn = new Map(); // section -> what it was drawn from
const open = new Set(); // details that somebody opened
let boot = "", leftOut = 0; // runs that the page has no room for

const named = (entries) => Object.assign(Object.create(null), entries); // keys come from outside: "constructor" may be one
const PARTS = named({ rewrite: ["rewriting", 3], sample: ["sampling", 0], decode: ["decoding", 5], encode: ["text encoding", 6], wait: ["waiting for rewards", 1], train: ["training", 2], refit: ["refitting detectors", 4] });
const TITLES = named({
  "reward/total_mean": "Trained reward ↑", "reward/total": "Trained reward ↑", distance: "Distance to photographs ↓", kernel_distance: "Kernel distance ↓",
  class_hit: "Class hit ↑", heldout_cnn: "Held-out CNN, log-odds ↑", heldout_spectrum: "Held-out spectrum, log-odds ↑",
  kl: "KL to the base policy", approx_kl: "KL of the step", clipfrac: "Share of clipped samples", ratio_dev: "Largest |ratio − 1|", grad_norm: "Gradient norm",
  loss: "Loss", lr: "Learning rate", "pictures/second": "Pictures a second ↑",
});
const TRAINING = ["reward/total", "kl", "grad_norm", "clipfrac", "ratio_dev", "pictures/second"];

// Small things

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const bdi = (text, attributes = {}) => el("bdi", attributes, String(text).replace(/[\p{Cc}\p{Cf}]/gu, " ")); // no text that turns its neighbours round
const dot = (k) => el("span", { class: `dot k${k % 8}` });

function number(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size < 1e-12) return "0"; // what rounding leaves of a difference
  if (size >= 1e5 || (size !== 0 && size < 1e-3)) return x.toExponential(1).replace("e+", "e");
  return String(Number(x.toPrecision(size >= 1000 ? 4 : 3)));
}
function duration(s) {
  if (s < 1) return `${Math.max(1, Math.round(1000 * s))} ms`;
  if (s < 90) return `${s < 10 ? number(s) : Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min` : `${Math.round(s / 86400)} days`;
}
const several = () => runs.size > 1;
const shown = () => [...runs.values()].filter((run) => run.shown && run.whole);

// Asking

async function ask(path) {
  const limit = new AbortController(), timer = setTimeout(() => limit.abort(), 30000);
  try {
    const response = await fetch(path, { signal: limit.signal });
    const body = await response.json();
    if (!response.ok) throw new Error(body.title || `status ${response.status}`);
    return body;
  } finally {
    clearTimeout(timer);
  }
}

function put(table, told) {
  // Rows from told.from on; a column that is new there is empty before.
  if (told.from === 0) Object.assign(table, { at: [], columns: named() });
  table.at.length = told.from;
  table.at.push(...told.at);
  for (const key of new Set([...Object.keys(table.columns), ...Object.keys(told.columns)])) {
    const column = (table.columns[key] ??= []);
    while (column.length < told.from) column.push(null);
    column.length = told.from;
    column.push(...(told.columns[key] ?? told.at.map(() => null)));
  }
  table.cursor = told.cursor;
}

async function update() {
  const answer = await ask("runs");
  if (answer.boot !== boot) drawn.clear();
  boot = answer.boot;
  leftOut = answer.left_out;
  const ids = new Set(answer.runs.map((run) => run.id));
  for (const id of [...runs.keys()]) if (!ids.has(id)) runs.delete(id);
  for (const brief of answer.runs) {
    if (!runs.has(brief.id)) {
      const used = new Set([...runs.values()].map((run) => run.colour));
      let colour = 0;
      while (used.has(colour)) colour += 1;
      runs.set(brief.id, { colour, shown: runs.size < 6, train: { at: [], columns: named() }, evals: { at: [], columns: named() }, grid: null });
    }
    const run = runs.get(brief.id);
    const stale = !run.whole || run.whole.revision !== brief.revision || run.boot !== boot;
    run.brief = brief;
    if (run.shown && stale) {
      const cursors = new URLSearchParams({ steps: run.train.cursor ?? "", evals: run.evals.cursor ?? "" });
      const whole = await ask(`runs/${brief.id}?${cursors}`);
      put(run.train, whole.train);
      put(run.evals, whole.evals);
      delete whole.train;
      delete whole.evals;
      run.whole = whole;
      run.boot = boot;
    }
  }
  return answer;
}

let waiting = null, asking = false;
async function turn() {
  clearTimeout(waiting);
  if (asking) return;
  asking = true;
  let pause = SLOW_MS;
  try {
    const answer = await update();
    say(`live, ${new Date().toLocaleTimeString()}`);
    if (answer.more) pause = 300;
    else if (answer.runs.some((run) => run.state === "running" || run.state === "waiting")) pause = FAST_MS;
    show();
  } catch (error) {
    say(`not connected (${error.name === "TypeError" || error.name === "AbortError" ? "nobody answers" : error.message}); what was last seen is shown`, true);
    pause = AWAY_MS;
  }
  asking = false;
  if (!document.hidden) waiting = setTimeout(turn, pause);
}
function say(text, bad = false) {
  $("live").textContent = text;
  $("live").className = bad ? "problem" : "quiet";
}

// Curves

function steps(low, high, count) {
  const raw = (high - low) / count || 1, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((n) => n * size >= raw * 0.999);
  const out = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9 && out.length < 12; n += 1) out.push(n * step);
  return out;
}

// lines: { label, k, at, values, error?, kind? ("thin", "dashed", "area") }; marks: { at, kind, k? }; between: fill from the first line to these values
function chart(title, lines, { note = "", marks = [], between = null, zero = false } = {}) {
  const legend = el("div", { class: "legend" }), plot = el("div", { class: "plot" });
  const card = el("div", { class: "card" }, el("div", { class: "title" }, el("h3", {}, bdi(title)), note ? el("span", { class: "quiet" }, note) : null), legend, plot);
  const told = lines.filter((line) => line.label !== null);
  const area = lines.some((line) => line.kind === "area");

  function tell(step) {
    const parts = told.map((line) => {
      let n = line.at.length - 1;
      if (step !== null) n = line.at.reduce((best, x, i) => (Math.abs(x - step) < Math.abs(line.at[best] - step) ? i : best), 0);
      else while (n > 0 && line.values[n] === null) n -= 1;
      return el("span", {}, dot(line.k), bdi(line.label), el("b", {}, number(line.values[n])));
    });
    legend.replaceChildren(...parts, ...(step === null ? [] : [el("span", { class: "last" }, `step ${step}`)]));
  }

  function draw() {
    const width = Math.max(240, plot.clientWidth), height = Math.round(Math.min(230, Math.max(150, width * 0.45)));
    const left = 44, right = 10, top = 8, bottom = 20;
    const xs = lines.flatMap((line) => (line.at.length ? [line.at[0], line.at[line.at.length - 1]] : []));
    let low = Infinity, high = -Infinity;
    for (const line of lines)
      line.values.forEach((v, n) => {
        if (v === null) return;
        const e = line.error?.[n] ?? 0;
        low = Math.min(low, v - e);
        high = Math.max(high, v + e);
      });
    if (!Number.isFinite(low)) return;
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low, high];
    if (zero || area) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const spare = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    if (!area && low !== 0) low -= spare;
    high += spare;
    const first = Math.min(...xs), last = Math.max(...xs, first + 1);
    const x = (v) => left + ((v - first) / (last - first)) * (width - left - right);
    const y = (v) => top + ((high - v) / (high - low)) * (height - top - bottom);
    const svg = el("svg:svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title}, by training step` });
    for (const v of steps(low, high, 4)) {
      svg.append(el("svg:line", { class: v === 0 ? "zero" : "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
      svg.append(el("svg:text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, number(Number(v.toPrecision(10)))));
    }
    for (const v of steps(first, last, Math.max(2, width / 90))) {
      if (Number.isInteger(v)) svg.append(el("svg:text", { x: x(v), y: height - 5, "text-anchor": v === first ? "start" : v === last ? "end" : "middle" }, String(v)));
    }
    const path = (line, of) => {
      let out = ""; // what is measured now and then is joined
      line.at.forEach((step, n) => {
        const v = of(n);
        if (v !== null) out += `${out ? "L" : "M"}${x(step).toFixed(1)} ${y(v).toFixed(1)}`;
      });
      return out;
    };
    const closed = (at, upper, lower) => {
      const kept = at.map((_, n) => n).filter((n) => upper[n] !== null && lower[n] !== null);
      const point = (n, v) => `${x(at[n]).toFixed(1)} ${y(v).toFixed(1)}`;
      return kept.length < 2 ? "" : `M${kept.map((n) => point(n, upper[n])).join("L")}L${kept.reverse().map((n) => point(n, lower[n])).join("L")}Z`;
    };
    if (between) svg.append(el("svg:path", { class: "gap", d: closed(lines[0].at, lines[0].values, between) }));
    let below = null;
    for (const line of lines) {
      const k = `k${line.k % 8}`;
      if (line.kind === "area") {
        below ??= line.at.map(() => 0);
        svg.append(el("svg:path", { class: `area ${k}`, d: closed(line.at, line.values, below) }));
        below = line.values;
        continue;
      }
      if (line.error) {
        const edge = (sign) => line.values.map((v, n) => (v === null ? null : v + sign * (line.error[n] ?? 0)));
        svg.append(el("svg:path", { class: `band ${k}`, d: closed(line.at, edge(1), edge(-1)) }));
      }
      svg.append(el("svg:path", { class: `curve ${k} ${line.kind ?? ""}`, d: path(line, (n) => line.values[n]) }));
      if (line.kind === undefined && line.values.filter((v) => v !== null).length <= 40)
        line.values.forEach((v, n) => v !== null && svg.append(el("svg:circle", { class: `point ${k}`, cx: x(line.at[n]), cy: y(v), r: 2.5 })));
    }
    for (const mark of marks)
      if (mark.at >= first && mark.at <= last)
        svg.append(el("svg:line", { class: mark.k === null ? mark.kind : `${mark.kind} own k${mark.k % 8}`, x1: x(mark.at), x2: x(mark.at), y1: top, y2: height - bottom }, el("svg:title", {}, `${mark.kind} at step ${mark.at}`)));
    const cursor = el("svg:line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    svg.append(cursor);
    const point = (event) => {
      const box = svg.getBoundingClientRect(), at = first + ((((event.clientX - box.left) * width) / box.width - left) / (width - left - right)) * (last - first);
      const near = lines.flatMap((line) => line.at).reduce((best, s) => (Math.abs(s - at) < Math.abs(best - at) ? s : best), lines[0].at[0]);
      cursor.setAttribute("x1", x(near));
      cursor.setAttribute("x2", x(near));
      cursor.setAttribute("visibility", "visible");
      tell(near);
    };
    const leave = () => {
      cursor.setAttribute("visibility", "hidden");
      tell(null);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
    plot.replaceChildren(svg);
  }
  tell(null);
  card.draw = draw;
  return card;
}

function place(box, nodes) {
  box.replaceChildren(...nodes);
  for (const node of nodes) node.draw?.();
  for (const node of nodes) for (const inner of node.querySelectorAll(".card")) inner.draw?.();
}

const smooth = (values, keep = 0.7) => {
  let mean = 0, weight = 0;
  return values.map((v) => {
    if (v === null) return null;
    mean = keep * mean + (1 - keep) * v;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
};
const has = (column) => column !== undefined && column.some((v) => v !== null);
const still = (column) => new Set(column.filter((v) => v !== null)).size < 2;
const alarms = (run) => run.whole.alarms.map((alarm) => ({ at: alarm.step, kind: "alarm", k: several() ? run.colour : null }));

function over(kind, key, title = TITLES[key] ?? key, more = []) {
  // One chart of a number, all runs in it.
  const lines = [], marks = [...more];
  for (const run of shown()) {
    const table = run[kind], values = table.columns[key];
    if (!has(values)) continue;
    marks.push(...alarms(run));
    const error = table.columns[key.replace(/\/mean$|_mean$/, (end) => (end === "/mean" ? "/sem" : "_sem"))];
    const line = { label: several() ? run.brief.name : "now", k: run.colour, at: table.at, values };
    const noisy = kind === "train" && !/\/version$|^lr$/.test(key) && values.filter((v) => v !== null).length > 12;
    if (noisy) lines.push({ ...line, kind: "thin" }, { ...line, label: null, values: smooth(values), kind: "plain" });
    else lines.push({ ...line, error: kind === "evals" && key !== "distance" && error !== values ? error : undefined });
  }
  return lines.length ? chart(title, lines, { marks }) : null;
}

// Sections: each is drawn anew only when what it shows has changed.

function section(name, from, nodes) {
  const now = JSON.stringify(from());
  if (drawn.get(name) === now) return;
  drawn.set(name, now);
  $(name).hidden = false; // what is hidden has no width to draw in
  const made = nodes();
  $(name).hidden = !made;
}
const version = (run) => [run.brief.id, run.colour, run.whole.revision];
const heading = (run, more = "") => el("div", { class: "title" }, several() ? dot(run.colour) : null, el("h3", {}, bdi(run.brief.name)), el("span", { class: "quiet" }, more));

function words({ state, reason, step, steps: target, step_s, left_s, read }) {
  if (read < 1) return `reading, ${Math.floor(100 * read)} %`;
  const at = step === null ? "" : `step ${step}${target ? ` of ${target}` : ""}`;
  const pace = step_s ? `${duration(step_s)} a step` : "";
  const said = {
    waiting: "waiting for its first line", gone: "its folder is gone", quiet: "quiet", finished: "finished",
    unreadable: reason, stopped: reason.startsWith("alarm") ? "stopped by the alarm" : reason || "stopped",
    running: step === null ? "starting" : "running",
  }[state];
  const left = left_s ? `about ${duration(left_s)} left` : "";
  return [said, at, state === "running" || state === "quiet" ? pace : "", left].filter(Boolean).join(", ");
}

function showRuns() {
  const nodes = [...runs.values()].map((run) => {
    const { brief } = run;
    const box = el("input", { type: "checkbox", "aria-label": `show ${brief.name}`, onchange: (event) => ((run.shown = event.target.checked), drawn.clear(), turn(), show()) });
    box.checked = run.shown;
    const bar = brief.steps ? el("progress", { max: brief.steps, value: Math.min(brief.step ?? 0, brief.steps), "aria-label": "steps done" }) : null;
    return el("label", { class: `run k${run.colour % 8}${run.shown ? "" : " off"}`, title: brief.folder }, box, bdi(brief.name, { class: "name" }), el("span", { class: "state quiet" }, words(brief)), bar);
  });
  const more = leftOut ? [el("p", { class: "quiet" }, `${leftOut} more run${leftOut === 1 ? "" : "s"}, written to longer ago, ${leftOut === 1 ? "is" : "are"} left out: name those to watch`)] : [];
  $("runs").replaceChildren(...nodes, ...more);
}

function warning(run, one) {
  const where = one.step === null ? "" : one.until > one.step ? `steps ${one.step}–${one.until}` : `step ${one.step}`;
  return el("div", { class: `warning ${one.level}` }, several() ? dot(run.colour) : null, bdi(one.text, { class: "what" }), where ? el("span", {}, where) : null);
}
function showWarnings() {
  const all = shown().flatMap((run) => run.whole.warnings.map((one) => [run, one]));
  all.sort(([, a], [, b]) => (a.step === null ? 0 : 1) - (b.step === null ? 0 : 1) || (b.until ?? 0) - (a.until ?? 0));
  const nodes = all.map(([run, one]) => warning(run, one));
  const rest = nodes.length > 4 ? [details("warnings", `${nodes.length - 3} more warnings`, nodes.slice(3))] : nodes.slice(3);
  $("warnings").replaceChildren(...nodes.slice(0, 3), ...rest);
  return all.length;
}
function details(name, title, nodes) {
  return el("details", { open: open.has(name), ontoggle: (event) => (event.target.open ? open.add(name) : open.delete(name)) }, el("summary", {}, title), ...nodes);
}

function showApart() {
  const cards = [];
  for (const run of shown()) {
    const { at, columns } = run.evals, trained = columns["gain/trained"];
    if (!has(trained) || at.length < 2) continue;
    const held = Object.keys(columns).filter((key) => key.startsWith("gain/") && key !== "gain/trained");
    const lines = [{ label: "trained reward", k: 0, at, values: trained }];
    held.forEach((key, n) => lines.push({ label: key.slice(5).replace("heldout_", "held-out "), k: n % 7 + 1, at, values: columns[key], kind: "dashed" }));
    const gap = columns.apart, now = gap?.[gap.length - 1];
    const between = gap ? trained.map((v, n) => (v === null || gap[n] === null ? null : v - Math.max(0, gap[n]))) : null;
    const note = now === undefined || now === null ? "nothing is held out" : now < 0.25 ? "together" : `apart by ${number(now)}`;
    cards.push(chart(run.brief.name, lines, { note, marks: alarms(run), between, zero: true }));
  }
  place($("apart").querySelector(".cards"), cards);
  return cards.length;
}

function showGrids() {
  const cards = shown().filter((run) => run.whole.grids.length).map((run) => {
    const { grids } = run.whole, steps = grids.map(([step]) => step);
    const at = run.grid === null || !steps.includes(run.grid) ? grids.length - 1 : steps.indexOf(run.grid);
    const link = el("a", { class: "picture", target: "_blank", rel: "noopener" }), told = el("span", { class: "quiet" });
    const turnTo = (n) => {
      const [step, stamp] = grids[n], source = `runs/${run.brief.id}/grids/${step}.png?v=${stamp}`;
      const image = el("img", { src: source, alt: `pictures drawn after step ${step}` });
      image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 640));
      link.href = source;
      link.replaceChildren(image);
      told.textContent = `after step ${step}${run.whole.best_step === step ? ", the best" : ""}${n === grids.length - 1 ? ", newest" : ""}`;
    };
    const slider = el("input", { type: "range", min: 0, max: grids.length - 1, value: at, "aria-label": "which evaluation", oninput: (event) => {
      const n = Number(event.target.value);
      run.grid = n === grids.length - 1 ? null : steps[n];
      turnTo(n);
    } });
    turnTo(at);
    const title = heading(run);
    title.lastChild.replaceWith(told);
    return el("div", { class: "card" }, title, link, grids.length > 1 ? el("div", { class: "slide" }, el("span", { class: "quiet" }, `${steps[0]}`), slider, el("span", { class: "quiet" }, `${steps[steps.length - 1]}`)) : null);
  });
  place($("grids").querySelector(".cards"), cards);
  return cards.length;
}

const WRITER = { "over_none/total": "Gain over no rewriting ↑", "over_untrained/total": "Gain over the untrained rewriter ↑" };
const moves = (kind, key) => shown().some((run) => run[kind].columns[key] && !still(run[kind].columns[key]));
const keys = (kind) => [...new Set(shown().flatMap((run) => Object.keys(run[kind].columns)))];
const rewardKeys = () => keys("evals").filter((key) => /^reward\/.+\/mean$/.test(key));
const rewardTitle = (key) => {
  const name = key.slice(7, -5), known = shown().flatMap((run) => run.whole.rewards).find((one) => one.name === name);
  return `${name}${known ? (known.held_out ? ", held out" : ", trained") + (known.sign < 0 ? " ↓" : " ↑") : ""}`;
};
const evalKeys = () => [
  ...["reward/total_mean", "distance", "class_hit", "kernel_distance"].filter((key) => keys("evals").includes(key)),
  ...keys("evals").filter((key) => key.startsWith("heldout_")), ...rewardKeys(),
];
const trainKeys = () => TRAINING.filter((key) => moves("train", key));
const adversaryKeys = () => [
  ...keys("train").filter((key) => /^adversary\/.+\/(accuracy|version|loss)$/.test(key) && moves("train", key)).map((key) => ["train", key]),
  ...keys("evals").filter((key) => /^adversary\/.+\/gap$/.test(key)).map((key) => ["evals", key]),
].sort(([, a], [, b]) => (a < b ? -1 : 1));
const writerKeys = () => [
  ...Object.entries(WRITER).filter(([key]) => keys("evals").includes(key)).map(([key, title]) => ["evals", key, title]),
  ...keys("train").filter((key) => /^(rewrites|penalty)\//.test(key) && moves("train", key)).map((key) => ["train", key]),
];

function showCharts(name, pairs) {
  const cards = pairs.map(([kind, key, title]) => over(kind, key, title)).filter(Boolean);
  place($(name).querySelector(".charts"), cards);
  return cards.length;
}

function showTime() {
  const cards = [];
  for (const run of shown()) {
    const parts = Object.entries(run.whole.seconds).map(([name, value], n) => ({ label: PARTS[name]?.[0] ?? name, k: PARTS[name]?.[1] ?? n + 4, name, value }));
    const whole = parts.reduce((sum, part) => sum + part.value, 0);
    if (!whole) continue;
    parts.sort((a, b) => b.value - a.value);
    const bar = el("div", { class: "share", role: "img", "aria-label": "shares of a step" });
    const legend = el("div", { class: "legend" });
    for (const part of parts) {
      const piece = el("span", { class: `k${part.k % 8}` });
      piece.style.flexGrow = part.value / whole;
      bar.append(piece);
      legend.append(el("span", {}, dot(part.k), bdi(part.label), el("b", {}, `${Math.round((100 * part.value) / whole)} %`)));
    }
    const { at, columns } = run.train, stack = [];
    let below = at.map(() => 0);
    for (const part of parts) {
      const column = columns[`seconds/${part.name}`];
      if (!column) continue;
      below = below.map((v, n) => v + (column[n] ?? 0));
      stack.push({ label: null, k: part.k, at, values: below, kind: "area" });
    }
    const card = el("div", { class: "card" }, heading(run, `${duration(whole)} a step, over its last 20`), bar, legend);
    if (at.length > 1) {
      const inner = chart("Seconds of a step", stack, {});
      inner.className = "inner";
      card.append(inner);
      card.draw = () => inner.draw();
    }
    cards.push(card);
  }
  place($("time").querySelector(".cards"), cards);
  return cards.length;
}

function showDetectors() {
  const cards = shown().filter((run) => run.whole.rewards.length).map((run) => {
    const rows = run.whole.rewards.map((one) => {
      const live = Object.hasOwn(run.whole.detectors, one.name) ? run.whole.detectors[one.name] : {}, column = run.evals.columns[`reward/${one.name}/mean`];
      const role = one.held_out ? "held out" : one.weight ? `weight ${number(one.weight)}` : "trained";
      const fits = live.refits === undefined ? "" : `${number(live.refits)} refit${live.refits === 1 ? "" : "s"}`;
      const accuracy = live.accuracy === undefined ? "" : `accuracy ${number(live.accuracy)}`;
      const current = live.version ?? one.version;
      return el("tr", {}, el("td", {}, bdi(one.name, { title: one.text })), el("td", {}, role),
        el("td", {}, current === null ? "–" : number(current), el("div", { class: "quiet" }, fits || "never refitted"), accuracy ? el("div", { class: "quiet" }, accuracy) : null),
        el("td", {}, el("code", { title: one.sha256 }, one.sha256.slice(0, 8) || "–")), el("td", {}, column ? number(column[column.length - 1]) : "–"));
    });
    const head = el("tr", {}, ...["reward", "role", "version", "weights at the start", "mean now"].map((text) => el("th", { scope: "col" }, text)));
    return el("div", { class: "card" }, heading(run), el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))));
  });
  place($("detectors").querySelector(".cards"), cards);
  const charts = [];
  for (const [kind, key] of adversaryKeys()) {
    const [, name, what] = key.split("/"), changed = (run) => (Object.hasOwn(run.whole.detectors, name) ? run.whole.detectors[name].changes ?? [] : []);
    const title = { accuracy: `${name}: accuracy at refits ↑`, gap: `${name}: references above samples ↓`, version: `${name}: version` }[what];
    const marks = what === "accuracy" ? shown().flatMap((run) => changed(run).map((at) => ({ at, kind: "change", k: run.colour }))) : [];
    const node = over(kind, key, title ?? `${name}: ${what}`, marks);
    if (node) charts.push(node);
  }
  place($("detectors").querySelector(".charts"), charts);
  return cards.length + charts.length;
}

function showRewrites() {
  const cards = shown().filter((run) => run.whole.rewrites?.rows.length).map((run) => {
    const { step, rows } = run.whole.rewrites;
    const pairs = rows.map((row) => el("div", { class: "pair" },
      el("p", { class: "quiet" }, bdi(row.prompt)), el("p", {}, bdi(row.rewrite || "(nothing)")),
      el("p", { class: "quiet" }, bdi(Object.entries(row.rewards).map(([name, value]) => `${name} ${number(value)}`).join(", ")))));
    const rest = pairs.length > 5 ? [details(`rewrites ${run.brief.id}`, `${pairs.length - 4} more`, pairs.slice(4))] : pairs.slice(4);
    return el("div", { class: "card" }, heading(run, `evaluation after step ${step}`), ...pairs.slice(0, 4), ...rest);
  });
  place($("rewrites").querySelector(".cards"), cards);
  return cards.length + showCharts("rewrites", cards.length ? writerKeys() : []);
}

function otherKeys() {
  const used = new Set([...evalKeys().map((key) => `evals ${key}`), ...trainKeys().map((key) => `train ${key}`), ...adversaryKeys().map(([kind, key]) => `${kind} ${key}`), ...writerKeys().map(([kind, key]) => `${kind} ${key}`)]);
  const dull = /^seconds\/|^gain\/|_?sem$|^n$|^reward\/total(_mean|_std)?$/;
  return ["evals", "train"].flatMap((kind) => keys(kind).filter((key) => !used.has(`${kind} ${key}`) && !dull.test(key)).map((key) => [kind, key, TITLES[key] ?? (kind === "evals" ? `${key} (evaluations)` : key)]));
}

function show() {
  showRuns();
  const all = () => shown().map(version);
  section("warnings", () => shown().map((run) => [run.brief.id, run.whole.warnings]), showWarnings);
  section("apart", () => shown().map((run) => [run.brief.id, run.brief.name, run.colour, run.evals.cursor, run.whole.alarms]), showApart);
  section("grids", () => shown().map((run) => [run.brief.id, run.brief.name, run.whole.grids, run.whole.best_step]), showGrids);
  section("evals", () => shown().map((run) => [run.brief.id, run.brief.name, run.evals.cursor, run.whole.alarms]), () => showCharts("evals", evalKeys().map((key) => ["evals", key, key.startsWith("reward/") && key.endsWith("/mean") ? rewardTitle(key) : undefined])));
  section("train", all, () => showCharts("train", trainKeys().map((key) => ["train", key])));
  section("time", all, showTime);
  section("detectors", () => shown().map((run) => [run.brief.id, run.brief.name, run.whole.rewards, run.whole.detectors, run.evals.cursor]), showDetectors);
  section("rewrites", () => shown().map((run) => [run.brief.id, run.whole.rewrites, run.evals.cursor]), showRewrites);
  if ($("more").querySelector("details").open) section("more", all, () => showCharts("more", otherKeys()) + 1);
  else $("more").hidden = !otherKeys().length;
  const [first] = runs.values();
  if (first) document.title = `${first.brief.step === null ? "" : `${first.brief.step}${first.brief.steps ? `/${first.brief.steps}` : ""} `}${first.brief.name}${several() ? ` and ${runs.size - 1} more` : ""} · Verism`;
}

$("more").querySelector("details").addEventListener("toggle", () => (drawn.delete("more"), show()));
document.addEventListener("visibilitychange", () => !document.hidden && turn());
let resized = null, width = innerWidth;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawn.clear();
    show();
  }, 200);
});
turn();
