// The training of a version: the curves of its run, and its samples at each step.

import { json, modelPath, request } from "./api.js";
import { chart, short } from "./chart.js";
import { $, el, newest } from "./dom.js";

const NO_CURVE = new Set(["step", "samples", "epoch", "seconds"]);

export function training(section, attempt) {
  const charts = $("[data-charts]", section);
  const table = $("[data-rows]", section);
  const samples = $("[data-samples]", section);
  const slider = $("[name=at]", section);
  const place = $("[data-shown]", section);
  let model = null;
  let steps = [];
  let addresses = []; // of the blobs that are shown

  async function load() {
    const requested = model;
    $("[data-run]", section).textContent = "Loading …";
    const history = await json(modelPath(model.name, "/history")).catch((error) => {
      $("[data-run]", section).textContent = "";
      throw error;
    });
    if (requested !== model) return;
    $("[data-run]", section).textContent = history.data.length
      ? `${history.model} is step ${history.step} of job ${history.job}; the dashed vertical line marks it.`
      : `The run of ${history.model} (job ${history.job}, step ${history.step}) has no records, or was deleted.`;
    const curves = grouped(history.data);
    charts.replaceChildren(...curves.map((series) => chart(series, history.step)));
    table.hidden = history.data.length === 0;
    $(".scroll", table).replaceChildren(tabled(history.data));
    steps = history.samples;
    samples.hidden = steps.length === 0;
    if (!steps.length) return;
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    await show();
  }

  const show = newest(async () => {
    const { step, files } = steps[Number(slider.value)];
    const requested = model;
    $("output", samples).textContent = step;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    const figures = await Promise.all(files.map((file) => figure(step, file)));
    if (requested !== model) return;
    const gone = addresses;
    addresses = figures.map(({ address }) => address).filter(Boolean);
    place.replaceChildren(...figures.map(({ element }) => element));
    gone.forEach(URL.revokeObjectURL);
  });

  async function figure(step, file) {
    const response = await request(modelPath(model.name, `/samples/${step}/${file}`));
    const name = file.split(".")[0];
    const caption = el("figcaption", { textContent: `${name}, step ${step}` });
    if (file.endsWith(".txt")) {
      const text = el("pre", { textContent: await response.text(), tabIndex: 0, role: "region", ariaLabel: name });
      return { element: el("figure", {}, text, caption) };
    }
    const address = URL.createObjectURL(await response.blob());
    const image = el("img", { src: address, alt: `${name} at step ${step}` });
    await image.decode();
    return { element: el("figure", {}, image, caption), address };
  }

  slider.addEventListener("input", () => attempt(show));

  return (shown) => {
    model = shown;
    charts.replaceChildren();
    place.replaceChildren();
    table.hidden = samples.hidden = true;
    attempt(load);
  };
}

/** Group metrics by chart: `loss` with `val_loss`, each other metric alone; metrics without a finite value are left out. */
function grouped(rows) {
  const names = [...new Set(rows.flatMap(Object.keys))].filter((name) => !NO_CURVE.has(name));
  const series = new Map();
  for (const name of names) {
    const points = rows.filter((row) => typeof row[name] === "number").map((row) => [row.step, row[name]]);
    if (points.length) series.set(name, { name, points });
  }
  const groups = [];
  for (const [name, own] of series) {
    if (name.startsWith("val_") && series.has(name.slice(4))) continue;
    const validated = series.get(`val_${name}`);
    groups.push(validated ? [own, validated] : [own]);
  }
  return groups.sort((a, b) => order(a) - order(b));
}

/** Order charts: losses first, then validation metrics. */
function order([{ name }]) {
  if (name === "loss") return 0;
  return name.startsWith("val_") ? 1 : 2;
}

function tabled(rows) {
  const names = ["step", ...new Set(rows.flatMap(Object.keys))].filter((name, i) => i === 0 || name !== "step");
  const cell = (value) => (typeof value === "number" ? short(value) : value ?? "");
  return el(
    "table",
    {},
    el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col", textContent: name })))),
    el(
      "tbody",
      {},
      ...rows.map((row) => el("tr", {}, ...names.map((name) => el("td", { textContent: cell(row[name]) })))),
    ),
  );
}
