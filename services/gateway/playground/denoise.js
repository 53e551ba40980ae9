// A drawn or uploaded image, noise on it, and the denoised image.

import { json, modelPath, pictures } from "./api.js";
import { $, base64, fit, newest, normals, randomSeed, readPicture, sizeOf, thumbnail } from "./dom.js";

export function denoise(section, attempt) {
  const form = $("form", section);
  const drawing = $("[data-drawing]", section);
  const noisy = $("[data-noisy]", section);
  const place = $("[data-shown]", section);
  const status = $("[data-status]", section);
  const pen = drawing.getContext("2d", { willReadFrequently: true });
  let model = null;
  let grain = 1; // seed of the noise: it stays the same while its strength is moved

  const clean = newest(async () => {
    const requested = model;
    prepare();
    const body = { images: [base64(noisy)] };
    const answer = await json(modelPath(model.name, "/denoise"), { body });
    if (requested !== model) return;
    place.replaceChildren(thumbnail(pictures(answer)[0], `${answer.model}-denoised.png`, "Download the denoised image"));
    status.textContent = "Denoised";
  });

  /** Return the drawing in the model's size, with noise. */
  function prepare() {
    fit(drawing, noisy, model.channels);
    const strength = Number(form.elements.noise.value);
    const context = noisy.getContext("2d", { willReadFrequently: true });
    const pixels = context.getImageData(0, 0, noisy.width, noisy.height);
    const draws = normals(grain);
    for (let i = 0; i < pixels.data.length; i += 4) {
      let added = 0;
      for (let channel = 0; channel < 3; channel++) {
        if (channel === 0 || model.channels > 1) added = 255 * strength * draws.next().value;
        pixels.data[i + channel] += added; // a clamped array
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  function show(picture) {
    pen.imageSmoothingEnabled = picture.width > drawing.width;
    fit(picture, drawing, model.channels);
  }

  function clear() {
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, drawing.width, drawing.height);
    prepare();
    place.replaceChildren();
    status.textContent = "";
  }

  async function sample() {
    const requested = model;
    const body = { model: model.name, prompt: "", seed: randomSeed() };
    const [source] = pictures(await json("v1/images/generations", { body }));
    const image = new Image();
    image.src = source;
    await image.decode();
    if (requested !== model) return;
    grain = body.seed;
    show(image);
    await clean();
  }

  function draw(event) {
    const { width } = drawing.getBoundingClientRect();
    const scale = drawing.width / width;
    const [x, y] = [event.offsetX * scale, event.offsetY * scale];
    if (event.type === "pointerdown") {
      pen.beginPath();
      pen.moveTo(x, y);
    }
    pen.strokeStyle = form.elements.color.value;
    pen.lineWidth = drawing.width / 11;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineTo(x, y);
    pen.stroke();
    prepare();
  }

  drawing.addEventListener("pointerdown", (event) => {
    drawing.setPointerCapture(event.pointerId);
    draw(event);
  });
  drawing.addEventListener("pointermove", (event) => {
    if (drawing.hasPointerCapture(event.pointerId)) draw(event);
  });
  drawing.addEventListener("pointerup", () => attempt(clean));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(clean);
  });
  form.elements.noise.addEventListener("input", () => {
    showNoise();
    attempt(clean);
  });
  $("[data-clear]", section).addEventListener("click", clear);
  $("[data-sample]", section).addEventListener("click", () => attempt(sample));
  $("[type=file]", section).addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (!file) return;
    attempt(async () => {
      show(await readPicture(file));
      await clean();
    });
  });

  const showNoise = () => ($("output", form).textContent = Number(form.elements.noise.value).toFixed(2));

  return (shown) => {
    model = shown;
    [noisy.width, noisy.height] = sizeOf(shown);
    drawing.height = Math.round((drawing.width * noisy.height) / noisy.width);
    $("[data-color]", section).hidden = shown.channels === 1;
    $("[data-sample]", section).hidden = !shown.verbs.includes("generate");
    showNoise();
    clear();
    if (shown.verbs.includes("generate")) attempt(sample);
  };
}
