// Sliders over a latent space, with the picture following.

import { curl, json, modelPath, pictures } from "./api.js";
import { $, base64, el, fit, newest, normals, readPicture, sizeOf, thumbnail } from "./dom.js";

const FIRST = 16; // sliders at first, and with each press of "more"

export function latent(section, attempt) {
  const form = $("form", section);
  const sliders = $("[data-sliders]", section);
  const more = $("[data-more]", section);
  const place = $("[data-shown]", section);
  const status = $("[data-status]", section);
  let model = null;
  let point = [];

  const follow = newest(async () => {
    const asked = model;
    const body = { latents: [point.map((value) => Number(value.toFixed(4)))] };
    const answer = await json(modelPath(model.name, "/decode"), { body });
    if (asked !== model) return;
    const picture = thumbnail(pictures(answer)[0], `${answer.model}-latent.png`, "Download this picture");
    place.replaceChildren(picture);
    $(".curl pre", section).textContent = curl(modelPath(model.name, "/decode"), body);
  });

  /** Puts all sliders to a point. */
  function go(values, said) {
    point = values;
    const reach = Math.max(3, Math.ceil(Math.max(...values.map(Math.abs)) * 1.25));
    const many = Math.max(FIRST, sliders.children.length);
    sliders.replaceChildren(...values.slice(0, many).map((value, i) => slider(i, value, reach)));
    offerMore(reach);
    status.textContent = said;
    return follow();
  }

  function slider(i, value, reach) {
    const shown = el("output", { textContent: value.toFixed(2) });
    const range = el("input", { type: "range", min: -reach, max: reach, step: 0.01, value });
    range.addEventListener("input", () => {
      point[i] = Number(range.value);
      shown.textContent = point[i].toFixed(2);
      attempt(follow);
    });
    return el("label", {}, el("span", { textContent: title(i) }), el("span", { className: "slider" }, range, shown));
  }

  const title = (i) => {
    const noise = model.latent_dim - (model.num_classes ?? 0);
    return i < noise ? `z ${i + 1}` : `class ${i - noise}`;
  };

  function offerMore(reach) {
    const left = point.length - sliders.children.length;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(left, FIRST)} more of ${point.length}`;
    more.onclick = () => {
      const from = sliders.children.length;
      sliders.append(...point.slice(from, from + FIRST).map((value, i) => slider(from + i, value, reach)));
      offerMore(reach);
      sliders.children[from].querySelector("input").focus();
    };
  }

  /** Where the picture of a seed lies. A model that cannot encode has standard normal noise for its latents. */
  async function fromSeed() {
    const asked = model;
    const seed = Number(form.elements.seed.value);
    if (!model.verbs.includes("encode")) return go(noise(seed), `From noise of seed ${seed}`);
    const drawn = await json("v1/images/generations", { body: { model: model.name, prompt: "", seed } });
    const found = await encode(drawn.data[0].b64_json);
    return asked === model && go(found, `From the picture of seed ${seed}`);
  }

  function noise(seed) {
    const draws = normals(seed);
    const classes = model.num_classes ?? 0;
    const values = Array.from({ length: model.latent_dim - classes }, () => draws.next().value);
    return [...values, ...Array.from({ length: classes }, (_, i) => Number(i === seed % classes))];
  }

  async function fromFile(file) {
    const asked = model;
    const [width, height] = sizeOf(model);
    const canvas = el("canvas", { width, height });
    fit(await readPicture(file), canvas, model.channels);
    const found = await encode(base64(canvas));
    return asked === model && go(found, `From ${file.name}`);
  }

  async function encode(image) {
    return (await json(modelPath(model.name, "/encode"), { body: { images: [image] } })).latents[0];
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(fromSeed);
  });
  $("[data-zero]", section).addEventListener("click", () =>
    attempt(() => go(new Array(model.latent_dim).fill(0), "All zero")),
  );
  $("[type=file]", section).addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) attempt(() => fromFile(file));
  });

  return (shown) => {
    model = shown;
    sliders.replaceChildren();
    place.replaceChildren();
    $("[data-upload]", section).hidden = !shown.verbs.includes("encode");
    attempt(fromSeed);
  };
}
