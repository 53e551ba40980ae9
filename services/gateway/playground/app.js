// The page: the key, the chosen model and version, and the open panel.

import { ApiError, json, key, modelPath } from "./api.js";
import { denoise } from "./denoise.js";
import { $, el } from "./dom.js";
import { images } from "./images.js";
import { interpolate } from "./interpolate.js";
import { latent } from "./latent.js";
import { text } from "./text.js";
import { training } from "./training.js";

const alertLine = $("#alert");
const chooser = $("#choice form");
const tabs = [...document.querySelectorAll("[role=tab]")];

/** Run an action of the user; show its error in the alert line. */
async function attempt(work) {
  alertLine.textContent = "";
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error instanceof ApiError && error.status === 401) askForKey(key.get() ? error.message : "");
    else alertLine.textContent = error.message;
    return undefined;
  }
}

// Each function gets its section, and returns a function that shows a model when the tab is opened.
const panels = Object.fromEntries(
  Object.entries({ text, images, latent, interpolate, denoise, training }).map(([id, create]) => [
    id,
    create(document.getElementById(id), attempt),
  ]),
);

let models = [];
let current = null; // the model as the API describes it, with `name`: the name of the request
let chosen = 0; // number of choices: a late answer must not replace a later choice
const shown = new Set(); // panels that have shown the current model

async function start() {
  models = await listed();
  $("#key").hidden = true;
  $("#forget").hidden = !key.get();
  $("#none").hidden = models.length > 0;
  $("#choice").hidden = models.length === 0;
  chooser.elements.model.replaceChildren(
    ...models.map((model) => el("option", { value: base(model.id), textContent: `${base(model.id)} · ${model.family}` })),
  );
  if (models.length) await openLinked();
}

/** Return all models, however many pages they take. */
async function listed() {
  const all = [];
  for (let page = {}; ; ) {
    page = await json(`v1/models${page.last_id ? `?after=${encodeURIComponent(page.last_id)}` : ""}`);
    all.push(...page.data);
    if (!page.has_more) return all;
  }
}

/** Open the model and panel of the address, e.g. #shapes@3/latent; default: the first model. */
async function openLinked() {
  const [name, tab] = decodeURIComponent(location.hash.slice(1)).split("/");
  const model = models.find(({ id }) => base(id) === base(name ?? "")) ?? models[0];
  chooser.elements.model.value = base(model.id);
  chooser.elements.version.value = base(name ?? "") === base(model.id) ? name.split("@")[1] ?? "" : "";
  await open(tab);
}

/** Show the panels of the chosen model. */
async function open(tab = selected()?.getAttribute("aria-controls")) {
  const model = chooser.elements.model.value;
  const version = chooser.elements.version.value.trim().replace(/^@/, "");
  const about = models.find(({ id }) => base(id) === model);
  suggest(about);
  const turn = ++chosen;
  current = null;
  shown.clear();
  $("#tabs").hidden = true;
  for (const id of Object.keys(panels)) document.getElementById(id).hidden = true;
  $("#about").replaceChildren();
  const name = version ? `${model}@${version}` : about.id;
  const described = await json(modelPath(name));
  if (turn !== chosen) return;
  current = { ...described, name };
  describe(current);
  for (const button of tabs) button.hidden = button.dataset.verb && !current.verbs.includes(button.dataset.verb);
  $("#tabs").hidden = false;
  const wanted = tabs.find((button) => !button.hidden && button.getAttribute("aria-controls") === tab);
  select(wanted ?? tabs.find((button) => !button.hidden));
  if (current.problem) throw new Error(current.problem);
}

function select(button) {
  const id = button.getAttribute("aria-controls");
  for (const other of tabs) {
    other.setAttribute("aria-selected", other === button);
    other.tabIndex = other === button ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = other !== button;
  }
  const row = $("#tabs"); // scrolls on a narrow screen
  row.scrollLeft = button.offsetLeft - (row.clientWidth - button.offsetWidth) / 2;
  history.replaceState(null, "", `#${current.name}/${id}`);
  if (shown.has(id)) return;
  shown.add(id);
  panels[id](current);
}

function describe(model) {
  const facts = {
    Version: `${base(model.id)}@${model.version}`,
    Family: model.family,
    Images: model.size && `${model.size.replace("x", " × ")}, ${model.channels === 1 ? "grey" : "colour"}`,
    Latent: model.latent_dim && `${model.latent_dim} numbers`,
    Context: model.block_size && `${model.block_size} tokens`,
    Vocabulary: model.vocab_size && `${model.vocab_size} tokens`,
    Aliases: Object.entries(model.aliases ?? {}).map(([alias, version]) => `${alias} → ${version}`).join(", "),
  };
  for (const [name, value] of Object.entries(model.metrics ?? {})) {
    if (typeof value === "number") facts[name] = Number(value.toPrecision(4));
  }
  for (const [name, metric] of Object.entries(model.evaluation?.metrics ?? {})) {
    if (metric.value !== null) facts[name] = withBaselines(metric);
  }
  facts["Evaluation notes"] = Object.entries(model.evaluation?.notes ?? {}).map(noted).join("; ");
  $("#about").replaceChildren(
    ...Object.entries(facts)
      .filter(([, value]) => value !== undefined && value !== "")
      .map(([name, value]) => el("div", {}, el("dt", { textContent: name }), el("dd", { textContent: value }))),
  );
}

/** Format a metric with its baselines: `23.1 dB (PCA, 32 components: 19.2)` */
function withBaselines({ value, unit, baselines }) {
  const shown = (number) => (number === null ? "?" : Number(number.toPrecision(4)));
  const others = Object.entries(baselines).map(([baseline, number]) => `${baseline}: ${shown(number)}`);
  return `${shown(value)} ${unit}`.trim() + (others.length ? ` (${others.join("; ")})` : "");
}

/** Format a note: `images seen: 448000`, `accuracy over time: 0.9, 0.6, 0.5` */
function noted([name, note]) {
  return `${name.replaceAll("_", " ")}: ${[note].flat().join(", ")}`;
}

function suggest(model) {
  const numbers = new Set([model.version, ...Object.values(model.aliases)]);
  const names = [...Object.keys(model.aliases), "latest", "live", ...[...numbers].sort((a, b) => b - a)];
  $("#versions").replaceChildren(...names.map((value) => el("option", { value })));
}

function askForKey(message) {
  key.forget();
  $("#forget").hidden = true;
  for (const id of ["choice", "tabs", "none", ...Object.keys(panels)]) document.getElementById(id).hidden = true;
  $("#key").hidden = false;
  $("#key form").elements.key.focus();
  alertLine.textContent = message;
}

const base = (name) => name.split("@")[0];
const selected = () => tabs.find((button) => button.getAttribute("aria-selected") === "true");

$("#key form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = event.target.elements.key;
  key.set(field.value.trim());
  field.value = "";
  attempt(start);
});
$("#forget").addEventListener("click", () => askForKey(""));
chooser.addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(open);
});
chooser.elements.model.addEventListener("change", () => {
  chooser.elements.version.value = "";
  attempt(open);
});
chooser.elements.version.addEventListener("change", () => attempt(open));
$("#tabs").addEventListener("click", (event) => {
  if (event.target.role === "tab") select(event.target);
});
$("#tabs").addEventListener("keydown", (event) => {
  const there = tabs.filter((button) => !button.hidden);
  const at = there.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: there.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const next = there[(to + there.length) % there.length];
  next.focus();
  select(next);
});
window.addEventListener("hashchange", () => {
  if (models.length) attempt(openLinked);
});

attempt(start);
