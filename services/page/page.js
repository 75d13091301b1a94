"use strict";
// Whatever comes from outside (file names, prompts, answers) becomes text, never markup: the page's policy allows nothing else.

const $ = (id) => document.getElementById(id);
const state = { pictures: [], info: new Map(), limits: {}, maps: [], next: 0, asking: null };
const LABELS = { read: "read", decode: "decode", queue: "queue", forward: "forward", score: "score", total: "total in the service" };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const number = (x) => (Math.abs(x) >= 1e6 || (x !== 0 && Math.abs(x) < 1e-4) ? x.toExponential(3) : String(Number(x.toFixed(4))));
const plain = (text) => text.replace(/\p{Cc}+/gu, " ").trim();
const name = (text) => el("bdi", {}, plain(text) || "picture");

function preview(picture, kind) {
  const image = el("img", { class: kind, alt: "", src: picture.url });
  image.addEventListener("load", () => Math.max(image.naturalWidth, image.naturalHeight) <= 128 && image.classList.add("tiny"));
  image.addEventListener("error", () => image.replaceWith(el("div", { class: `${kind} none` }, "no preview")));
  return image;
}

// Pictures: chosen, dropped or pasted.

function add(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/") || /\.(qoi|png|jpe?g|webp)$/i.test(file.name));
  const room = (state.limits.items ?? 256) - state.pictures.length;
  for (const file of pictures.slice(0, room)) state.pictures.push({ file, url: URL.createObjectURL(file), key: state.next++ });
  const left = files.length - Math.min(pictures.length, room);
  if (left) say(`${left} ${left === 1 ? "file was" : "files were"} left out: ${pictures.length > room ? "too many" : "no pictures"}`);
  else if (pictures.length) say(`${state.pictures.length} chosen`);
  show();
  if (pictures.length && !$("go").disabled && document.activeElement !== $("prompt")) $("go").focus();
}

function remove(key) {
  const index = state.pictures.findIndex((picture) => picture.key === key);
  URL.revokeObjectURL(state.pictures[index].url);
  state.pictures.splice(index, 1);
  say(`${state.pictures.length} chosen`);
  show();
  const buttons = $("chosen").querySelectorAll("button");
  (buttons[Math.min(index, buttons.length - 1)] ?? $("files")).focus();
}

function show() {
  $("chosen").replaceChildren(
    ...state.pictures.map((picture) =>
      el(
        "li",
        {},
        preview(picture, "thumb"),
        el("span", { class: "name", title: plain(picture.file.name) }, name(picture.file.name)),
        el("button", { type: "button", "aria-label": `Remove ${plain(picture.file.name)}`, onclick: () => remove(picture.key) }, "✕"),
      ),
    ),
  );
  $("clear").hidden = !state.pictures.length;
  ready();
}

const chosenRewards = () => [...$("rewards").querySelectorAll("input:checked")].map((box) => box.value);

function ready() {
  $("go").disabled = !state.pictures.length || !chosenRewards().length || state.asking !== null;
}

function say(text) {
  $("said").textContent = text;
}

function problem(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}

// The request, and the same as a curl line.

const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const address = (path) => new URL(path, document.baseURI).href;

function curl(pictures, prompt, rewards) {
  const parts = pictures.map(({ file }) => {
    const path = (file.name.startsWith("-") ? "./" : "") + file.name.replace(/[\p{Cc}\u202a-\u202e\u2066-\u2069]/gu, "_");
    const inner = /^[\w./ -]+$/.test(path) ? path : `"${path.replace(/["\\]/g, "\\$&")}"`;
    return `-F ${/^[\w./-]+$/.test(path) ? `image=@${path}` : quote(`image=@${inner}`)}`;
  });
  if (prompt) parts.push(`--form-string ${quote(`prompt=${prompt}`)}`);
  parts.push(`-F ${/^[\w,.-]+$/.test(rewards.join(",")) ? `rewards=${rewards.join(",")}` : quote(`rewards=${rewards.join(",")}`)}`);
  if (!$("lock").hidden) parts.unshift('-H "authorization: Bearer $VERISM_KEY"');
  return `curl -sS ${parts.join(" \\\n  ")} \\\n  ${quote(address("score")).replace(/^'([\w:/.-]+)'$/, "$1")}`;
}

function told(body, status) {
  const wait = body?.retry_after_ms ? ` Try again in ${Math.max(1, Math.round(body.retry_after_ms / 1000))} s.` : "";
  return (body?.title ?? `The service answered ${status}.`) + wait + (body?.detail ? ` (${body.detail})` : "");
}

const keyed = () => ($("key").value ? { authorization: `Bearer ${$("key").value.trim()}` } : {});

async function read(answer) {
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) {
    locked(true);
    throw new Error($("key").value ? "The service does not know this key." : "This service asks for a key.");
  }
  if (!answer.ok || body === null) throw new Error(told(body, answer.status));
  return body;
}

function locked(yes) {
  $("lock").hidden = !yes;
  document.querySelectorAll("nav a").forEach((link) => (link.hidden = yes)); // a link carries no key
}

async function send(path, form, signal) {
  return read(await fetch(path, { method: "POST", body: form, signal, headers: keyed() }));
}

async function ask() {
  const pictures = [...state.pictures];
  const prompt = plain($("prompt").value);
  const rewards = chosenRewards();
  const bytes = pictures.reduce((sum, { file }) => sum + file.size, 0);
  problem();
  if (bytes > (state.limits.body_bytes ?? Infinity)) {
    return problem(`These pictures are ${(bytes / 2 ** 20).toFixed(0)} MiB; the service takes ${(state.limits.body_bytes / 2 ** 20).toFixed(0)} MiB at once.`);
  }
  const form = new FormData();
  for (const { file } of pictures) form.append("image", file, file.name);
  if (prompt) form.append("prompt", prompt);
  form.append("rewards", rewards.join(","));
  state.asking = new AbortController();
  ready();
  say("scoring…");
  const began = performance.now();
  try {
    const answer = await send("score", form, state.asking.signal);
    render(answer, pictures, rewards, performance.now() - began);
    $("curl").textContent = curl(pictures, prompt, rewards);
  } catch (error) {
    if (error.name !== "AbortError") problem(error instanceof TypeError ? "The service does not answer." : error.message);
    say("");
  } finally {
    state.asking = null;
    ready();
  }
}

// The answer.

function render(answer, pictures, rewards, milliseconds) {
  const scores = answer.items.flatMap((item) => Object.values(item.scores));
  const failed = scores.filter((score) => score.status !== "ok").length;
  $("cards").replaceChildren(...answer.items.map((item, index) => card(item, pictures[index], answer.rewards)));
  const times = Object.entries(answer.timing_ms ?? {}).map(([key, ms]) => pair(LABELS[key] ?? key, `${number(Number(ms.toFixed(1)))} ms`));
  $("times").replaceChildren(...times, pair("with the network", `${number(Number(milliseconds.toFixed(1)))} ms`));
  $("answer").hidden = false;
  say(`${scores.length - failed} ${scores.length - failed === 1 ? "score" : "scores"}${failed ? `, ${failed} failed` : ""}`);
  $("answer-title").focus();
}

const pair = (key, value) => el("div", {}, el("dt", {}, key), el("dd", {}, value));

function card(item, picture, used) {
  const frame = el("div", { class: "frame" }, preview(picture, "thumb"));
  const figure = el("figure", { class: "picture" }, frame);
  const scores = Object.entries(item.scores);
  const titles = new Set(scores.map(([, score]) => score.error?.title));
  const same = scores.length > 1 && titles.size === 1 ? [...titles][0] : undefined;  // a broken picture fails for all alike
  return el(
    "article",
    { class: "card" },
    figure,
    el(
      "div",
      {},
      el("h3", {}, name(picture.file.name)),
      item.lossy ? el("p", { class: "warn" }, "lossy file: compression has changed what a detector sees") : null,
      same ? el("p", { class: "failed" }, `${same} (${scores.map(([reward]) => reward).join(", ")})`) : null,
      ...(same ? [] : scores.map(([reward, score]) => scored(reward, score, used[reward], picture, figure))),
    ),
  );
}

function scored(reward, score, used, picture, figure) {
  const info = state.info.get(reward);
  const line = el("div", { class: "line" }, el("strong", {}, reward));
  const block = el("section", { class: "score", "aria-label": reward }, line);
  if (score.value === null) {
    block.append(el("p", { class: "failed" }, score.error?.title ?? score.status));
    return block;
  }
  line.append(el("span", { class: "value" }, Math.abs(score.value) < 1e4 ? score.value.toFixed(4) : number(score.value)));
  if (score.sigma !== null) line.append(el("span", { class: "quiet" }, `± ${number(score.sigma)}`));
  if (info?.higher_is_better === false) line.append(el("span", { class: "quiet" }, "lower is better"));
  if (used) line.append(el("span", { class: "quiet" }, `version ${used.version}${score.cached ? ", cached" : ""}`));
  if (info?.range) {
    const [low, high] = info.range;
    const fill = el("span");
    fill.style.width = `${Math.min(100, Math.max(0, (100 * (score.value - low)) / (high - low)))}%`;
    block.append(el("div", { class: "bar", "aria-hidden": "true", title: `${number(low)} to ${number(high)}` }, fill));
  }
  if (score.in_domain === false) {
    block.append(el("p", { class: "warn" }, "out of domain: unlike what this reward was fitted on, the number means little"));
  }
  const parts = Object.entries(score.parts ?? {}).map(([key, value]) => pair(key, number(value)));
  if (score.text) parts.push(pair("text", el("bdi", {}, score.text)));
  if (parts.length) block.append(el("dl", { class: "pairs" }, ...parts));
  if (state.maps.includes(reward)) block.append(mapButton(reward, picture, figure));
  return block;
}

// The map of patches, laid over the picture.

function mapButton(reward, picture, figure) {
  const button = el("button", { type: "button", class: "button small", "aria-pressed": "false" }, "Show where");
  button.addEventListener("click", async () => {
    const on = button.getAttribute("aria-pressed") === "true";
    for (const other of figure.parentNode.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", "false");
    figure.querySelectorAll("canvas, figcaption").forEach((node) => node.remove());
    if (on) return;
    button.disabled = true;
    try {
      const form = new FormData();
      form.append("image", picture.file, picture.file.name);
      draw(await send(`v1/map?reward=${encodeURIComponent(reward)}`, form), figure);
      button.setAttribute("aria-pressed", "true");
    } catch (error) {
      figure.append(el("figcaption", { class: "failed legend" }, error instanceof TypeError ? "The service does not answer." : error.message));
    } finally {
      button.disabled = false;
      button.focus();
    }
  });
  return button;
}

function draw(map, figure) {
  const flat = map.rows.flat();
  const low = Math.min(...flat);
  const high = Math.max(...flat);
  const probabilities = low >= 0 && high <= 1; // painted as they are; other scales from the smallest to the largest number
  const canvas = el("canvas", { width: map.width, height: map.height, role: "img", "aria-label": `Map of ${map.reward}` });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(map.width, map.height);
  flat.forEach((value, index) => {
    const generated = probabilities ? value : high > low ? (value - low) / (high - low) : 0;
    pixels.data.set([213, 94, 0, Math.round(204 * generated)], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
  figure.querySelector(".frame").append(canvas);
  const [from, to] = probabilities ? [0, 1] : [low, high];
  const said = probabilities ? ` (here ${number(low)} to ${number(high)})` : "";
  const scale = el("span", { class: "scale" });
  const legend = el("figcaption", { class: "quiet legend" }, `${map.reward}: ${number(from)}`, scale, `${number(to)}, more like a generated picture${said}`);
  figure.append(legend);
}

// Wiring.

async function start() {
  try {
    const [served, maps] = await Promise.all(["v1/rewards", "v1/map"].map((path) => fetch(path, { headers: keyed() }).then(read)));
    state.info = new Map(served.rewards.map((info) => [info.name, info]));
    state.limits = served.limits ?? {};
    state.maps = maps.rewards ?? [];
    $("rewards").replaceChildren(
      ...served.rewards.map((info) => {
        const box = el("input", { type: "checkbox", value: info.name, checked: served.default.includes(info.name), onchange: ready });
        const needs = info.needs.includes("prompt") ? " Needs a prompt." : "";
        return el("label", {}, box, el("span", {}, info.name, el("span", { class: "quiet" }, info.description + (info.description && needs ? "." : "") + needs)));
      }),
    );
    problem();
  } catch (error) {
    problem(error instanceof TypeError ? "The service does not say what it serves: reload the page." : error.message);
  }
  ready();
}

$("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("go").disabled) ask();
});
$("clear").addEventListener("click", () => {
  state.asking?.abort();
  state.pictures.forEach((picture) => URL.revokeObjectURL(picture.url));
  state.pictures = [];
  $("answer").hidden = true;
  problem();
  say("");
  show();
  $("files").focus();
});
$("key").addEventListener("change", start);
$("copy").addEventListener("click", async () => {
  const range = document.createRange();
  range.selectNodeContents($("curl"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch {
    if (!document.execCommand("copy")) return say("selected: copy it with the keyboard");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  add(event.clipboardData.files);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const files = event.dataTransfer.files;
  if (files.length) add(files);
  else say("drop files: an address is never fetched");
});
start();
