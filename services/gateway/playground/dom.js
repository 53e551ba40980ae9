// Helpers of all panels: elements, values of forms, seeds, and requests with only the newest values.

export const $ = (selector, root = document) => root.querySelector(selector);

/** Create an element with properties and children; `data` and `aria` are sets of attributes. */
export function el(tag, properties = {}, ...children) {
  const { data = {}, aria = {}, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

/** Return the values of a form by name, without empty and hidden fields; numbers as numbers. */
export function values(form) {
  const fields = {};
  for (const field of form.elements) {
    if (!field.name || field.value === "" || field.closest("[hidden]") !== null) continue;
    fields[field.name] = ["number", "range"].includes(field.type) ? Number(field.value) : field.value;
  }
  return fields;
}

/** Return a random seed: exact as a JavaScript number, and unlikely to occur twice. */
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Return standard normal numbers, equal for equal seeds (mulberry32, Box-Muller). */
export function* normals(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  for (;;) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    yield radius * Math.cos(angle);
    yield radius * Math.sin(angle);
  }
}

/** Return a function that calls `work` with the newest arguments, one call at a time; older waiting calls are dropped. */
export function newest(work) {
  let waiting = null;
  let busy = false;
  return async (...args) => {
    waiting = args;
    if (busy) return;
    busy = true;
    try {
      while (waiting) {
        const now = waiting;
        waiting = null;
        await work(...now);
      }
    } finally {
      busy = false;
    }
  };
}

/** Create an image that is downloaded when it is clicked. */
export function thumbnail(source, file, label) {
  const image = el("img", { src: source, alt: "" });
  return el("a", { href: source, download: file, className: "picture", title: "Download", aria: { label } }, image);
}

/** Show the seed of an answer, with a button that copies it into the form. */
export function showSeed(place, form, seed) {
  const keep = el("button", { type: "button", className: "quiet", textContent: "Keep this seed" });
  keep.addEventListener("click", () => {
    form.elements.seed.value = seed;
    form.elements.seed.focus();
  });
  place.replaceChildren(`Seed ${seed} `, keep);
}

/** Decode the image of a file. */
export async function readPicture(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read; choose a PNG, JPEG or WebP`);
  }
}

/** Draw the middle of an image onto a canvas of the model's size; grey for a grey model. */
export function fit(picture, canvas, channels) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const scale = Math.max(canvas.width / picture.width, canvas.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#000";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  if (channels !== 1) return;
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [r, g, b] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(0.299 * r + 0.587 * g + 0.114 * b, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
}

/** Return [width, height] of a model's images. */
export const sizeOf = (model) => model.size.split("x").map(Number);

/** Return a canvas as base64 of a PNG file. */
export const base64 = (canvas) => canvas.toDataURL("image/png").split(",")[1];
