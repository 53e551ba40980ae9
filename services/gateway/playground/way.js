// The way between two seeds, as a strip of pictures.

import { curl, json, modelPath, pictures } from "./api.js";
import { $, newest, randomSeed, thumbnail, values } from "./dom.js";

export function way(section, attempt) {
  const form = $("form", section);
  const place = $("[data-shown]", section);
  const status = $("[data-status]", section);
  let model = null;

  const walk = newest(async () => {
    const asked = model;
    const body = values(form);
    const path = modelPath(model.name, "/interpolate");
    status.textContent = "Walking …";
    const answer = await json(path, { body }).finally(() => (status.textContent = ""));
    if (asked !== model) return;
    const found = pictures(answer);
    place.replaceChildren(
      ...found.map((source, i) => {
        const file = `${answer.model}-${body.start}-to-${body.end}-${i + 1}.png`;
        return thumbnail(source, file, `Download step ${i + 1} of ${found.length}`);
      }),
    );
    status.textContent = `${found.length} steps from seed ${body.start} to seed ${body.end}`;
    $(".curl pre", section).textContent = curl(path, body);
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(walk);
  });
  $("[data-other]", section).addEventListener("click", () => {
    form.elements.start.value = randomSeed();
    form.elements.end.value = randomSeed();
    attempt(walk);
  });

  return (shown) => {
    model = shown;
    place.replaceChildren();
    attempt(walk);
  };
}
