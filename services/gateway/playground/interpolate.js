// An interpolation between two seeds, as a strip of images.

import { curl, json, modelPath, pictures } from "./api.js";
import { $, newest, randomSeed, thumbnail, values } from "./dom.js";

export function interpolate(section, attempt) {
  const form = $("form", section);
  const place = $("[data-shown]", section);
  const status = $("[data-status]", section);
  let model = null;

  const run = newest(async () => {
    const requested = model;
    const body = values(form);
    const path = modelPath(model.name, "/interpolate");
    status.textContent = "Computing …";
    const answer = await json(path, { body }).finally(() => (status.textContent = ""));
    if (requested !== model) return;
    const sources = pictures(answer);
    place.replaceChildren(
      ...sources.map((source, i) => {
        const file = `${answer.model}-${body.start}-to-${body.end}-${i + 1}.png`;
        return thumbnail(source, file, `Download step ${i + 1} of ${sources.length}`);
      }),
    );
    status.textContent = `${sources.length} steps from seed ${body.start} to seed ${body.end}`;
    $(".curl pre", section).textContent = curl(path, body);
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(run);
  });
  $("[data-other]", section).addEventListener("click", () => {
    form.elements.start.value = randomSeed();
    form.elements.end.value = randomSeed();
    attempt(run);
  });

  return (shown) => {
    model = shown;
    place.replaceChildren();
    attempt(run);
  };
}
