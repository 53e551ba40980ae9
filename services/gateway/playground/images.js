// New images from a seed.

import { curl, json, pictures } from "./api.js";
import { $, el, newest, randomSeed, showSeed, thumbnail, values } from "./dom.js";

export function images(section, attempt) {
  const form = $("form", section);
  const place = $("[data-shown]", section);
  const status = $("[data-status]", section);
  let model = null;

  const body = () => {
    const { label, ...fields } = values(form);
    return { model: model.name, prompt: "", seed: randomSeed(), ...fields, ...(label && { label: Number(label) }) };
  };

  const draw = newest(async () => {
    const drawn = model;
    const sent = body();
    status.textContent = "Generating …";
    const answer = await json("v1/images/generations", { body: sent }).finally(() => (status.textContent = ""));
    if (drawn !== model) return;
    const sources = pictures(answer);
    place.replaceChildren(
      ...sources.map((source, i) => {
        const file = `${answer.model}-seed-${answer.seed}-${i + 1}.png`;
        return thumbnail(source, file, `Download image ${i + 1} of ${sources.length}`);
      }),
    );
    status.textContent = `${sources.length} ${sources.length === 1 ? "image" : "images"}; click one to download it`;
    showSeed($("[data-seed]", section), form, answer.seed);
    $(".curl pre", section).textContent = curl("v1/images/generations", sent);
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(draw);
  });

  return (shown) => {
    model = shown;
    place.replaceChildren();
    $("[data-seed]", section).replaceChildren();
    $("[data-classes]", section).hidden = !shown.num_classes;
    const classes = Array.from({ length: shown.num_classes ?? 0 }, (_, i) => el("option", { value: i, textContent: i }));
    form.elements.label.replaceChildren(el("option", { value: "", textContent: "any" }), ...classes);
    attempt(draw);
  };
}
