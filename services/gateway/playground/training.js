// How a version was trained: its run's curves, and what it made step by step.

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
    const asked = model;
    $("[data-run]", section).textContent = "Loading …";
    const found = await json(modelPath(model.name, "/history")).catch((error) => {
      $("[data-run]", section).textContent = "";
      throw error;
    });
    if (asked !== model) return;
    $("[data-run]", section).textContent = found.data.length
      ? `${found.model} is step ${found.step} of job ${found.job}; a dashed upright line marks it.`
      : `The run of ${found.model} (job ${found.job}, step ${found.step}) left no curves, or was deleted.`;
    const curves = grouped(found.data);
    charts.replaceChildren(...curves.map((series) => chart(series, found.step)));
    table.hidden = found.data.length === 0;
    $(".scroll", table).replaceChildren(tabled(found.data));
    steps = found.samples;
    samples.hidden = steps.length === 0;
    if (!steps.length) return;
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    await show();
  }

  const show = newest(async () => {
    const { step, files } = steps[Number(slider.value)];
    const asked = model;
    $("output", samples).textContent = step;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    const figures = await Promise.all(files.map((file) => figure(step, file)));
    if (asked !== model) return;
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

/** Metrics that belong on one chart: `loss` with `val_loss`; the rest alone. Each has a finite value somewhere. */
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
    const judged = series.get(`val_${name}`);
    groups.push(judged ? [own, judged] : [own]);
  }
  return groups.sort((a, b) => order(a) - order(b));
}

/** Losses first, then what is measured in validation. */
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
