// A line chart as SVG: axes with labels, a legend, and the value under the pointer.

import { el } from "./dom.js";

const [WIDTH, HEIGHT] = [360, 200];
const EDGE = { left: 48, right: 10, top: 10, bottom: 34 };

export const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(4)).toString().replace("e+", "e"));

/**
 * Return a figure of at most two series over steps.
 * series: [{ name, points: [[step, value], ...] }]; mark: a step to mark with a line.
 */
export function chart(series, mark) {
  const all = series.flatMap(({ points }) => points);
  const x = scale(all.map(([step]) => step), EDGE.left, WIDTH - EDGE.right);
  const y = scale(all.map(([, value]) => value), HEIGHT - EDGE.bottom, EDGE.top);
  const image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary(series) });
  for (const tick of y.ticks) {
    image.append(
      svg("line", { class: "rule", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: EDGE.left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)),
    );
  }
  for (const tick of x.ticks) {
    image.append(svg("text", { x: x(tick), y: HEIGHT - EDGE.bottom + 15, "text-anchor": "middle" }, short(tick)));
  }
  image.append(svg("text", { x: (EDGE.left + WIDTH - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step"));
  if (mark !== undefined && mark >= x.low && mark <= x.high) {
    image.append(svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
  }
  series.forEach(({ points }, i) => {
    const path = points.map(([step, value], j) => `${j ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    image.append(svg("path", { class: `line series-${i + 1}`, d: path.join("") }));
    if (points.length === 1) {
      image.append(svg("circle", { class: `series-${i + 1}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 }));
    }
  });
  const readout = el("span", { className: "readout" });
  const names = series.map(({ name }, i) => el("span", { className: i ? "key second" : "key", textContent: name }));
  watch(image, series, x, readout);
  return el("figure", {}, el("figcaption", {}, ...names, readout), image);
}

/** Show the values nearest to the pointer. */
function watch(image, series, x, readout) {
  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const near = series.map(({ points }) =>
      points.reduce((best, point) => (Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best)),
    );
    readout.textContent = `${near[0][0]}: ${near.map(([, value]) => short(value)).join(" / ")}`;
  });
  image.addEventListener("pointerleave", () => (readout.textContent = ""));
}

function summary(series) {
  return series
    .map(({ name, points }) => {
      const [first, last] = [points[0], points.at(-1)];
      return `${name} from ${short(first[1])} at step ${first[0]} to ${short(last[1])} at step ${last[0]}`;
    })
    .join("; ");
}

/** Return a linear map from values to positions, with round ticks. */
function scale(values, from, to) {
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const map = (value) => from + ((value - low) / (high - low)) * (to - from);
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return Object.assign(map, { low, high, ticks });
}

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
