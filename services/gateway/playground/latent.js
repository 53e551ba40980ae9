// Sliders for the dimensions of a latent, with the decoded image.

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
    const requested = model;
    const body = { latents: [point.map((value) => Number(value.toFixed(4)))] };
    const answer = await json(modelPath(model.name, "/decode"), { body });
    if (requested !== model) return;
    const picture = thumbnail(pictures(answer)[0], `${answer.model}-latent.png`, "Download this image");
    place.replaceChildren(picture);
    $(".curl pre", section).textContent = curl(modelPath(model.name, "/decode"), body);
  });

  /** Set all sliders to a latent. */
  function go(values, message) {
    point = values;
    const reach = Math.max(3, Math.ceil(Math.max(...values.map(Math.abs)) * 1.25));
    const many = Math.max(FIRST, sliders.children.length);
    sliders.replaceChildren(...values.slice(0, many).map((value, i) => slider(i, value, reach)));
    offerMore(reach);
    status.textContent = message;
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

  /** Set the sliders to the latent of a seed's image; without an encoder, to standard normal noise. */
  async function fromSeed() {
    const requested = model;
    const seed = Number(form.elements.seed.value);
    if (!model.verbs.includes("encode")) return go(noise(seed), `From noise of seed ${seed}`);
    const drawn = await json("v1/images/generations", { body: { model: model.name, prompt: "", seed } });
    const encoded = await encode(drawn.data[0].b64_json);
    return requested === model && go(encoded, `From the image of seed ${seed}`);
  }

  function noise(seed) {
    const draws = normals(seed);
    const classes = model.num_classes ?? 0;
    const values = Array.from({ length: model.latent_dim - classes }, () => draws.next().value);
    return [...values, ...Array.from({ length: classes }, (_, i) => Number(i === seed % classes))];
  }

  async function fromFile(file) {
    const requested = model;
    const [width, height] = sizeOf(model);
    const canvas = el("canvas", { width, height });
    fit(await readPicture(file), canvas, model.channels);
    const encoded = await encode(base64(canvas));
    return requested === model && go(encoded, `From ${file.name}`);
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
