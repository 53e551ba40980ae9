// Text that appears while it is generated, with the sampling options.

import { curl, events, request } from "./api.js";
import { $, randomSeed, showSeed, values } from "./dom.js";

export function text(section, attempt) {
  const form = $("form", section);
  const stop = $("[data-stop]", section);
  const output = $("[data-output]", section);
  const rate = $("[data-rate]", section);
  const prompt = $("[name=prompt]", form);
  let suggested = prompt.value;
  let model = null;
  let aborter = null;

  function body() {
    const fields = values(form);
    const stops = (fields.stop ?? "").split("\n").filter(Boolean);
    delete fields.stop;
    return {
      model: model.name,
      seed: randomSeed(),
      ...fields,
      ...(stops.length ? { stop: stops.map((line) => line.replaceAll("\\n", "\n")) } : {}),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  async function write() {
    const sent = body();
    aborter?.abort();
    const mine = new AbortController();
    aborter = mine;
    $("[data-prompt]", section).textContent = sent.prompt;
    output.textContent = "";
    $("[data-shown]", section).hidden = false;
    $(".curl pre", section).textContent = curl("v1/completions", sent);
    showSeed($("[data-seed]", section), form, sent.seed);
    begin();
    try {
      await follow(sent, mine);
    } catch (error) {
      if (aborter !== mine) return; // another one is being written meanwhile
      rate.textContent = error.name === "AbortError" ? `Stopped after ${output.textContent.length} characters` : "";
      throw error;
    } finally {
      if (aborter === mine) end();
    }
  }

  /** Show text deltas as they arrive, then their rate. */
  async function follow(sent, { signal }) {
    const started = performance.now();
    let first = 0;
    let usage = null;
    let why = "";
    rate.textContent = "Generating …";
    const response = await request("v1/completions", { body: sent, signal });
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      first ||= performance.now();
      why = choice.finish_reason ?? why;
      output.append(choice.text);
      output.normalize();
    }
    const seconds = Math.max((performance.now() - started) / 1000, 0.001);
    const tokens = usage.completion_tokens;
    rate.textContent =
      `${tokens} tokens, ${(tokens / seconds).toFixed(0)} tokens/s, first after ${(first - started).toFixed(0)} ms` +
      (why === "stop" ? ", ended at a stop text" : "");
  }

  function begin() {
    stop.disabled = false;
    output.setAttribute("aria-busy", "true");
  }

  function end() {
    stop.disabled = true;
    output.removeAttribute("aria-busy"); // from now on a screen reader reads it, in one go
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(write);
  });
  stop.addEventListener("click", () => aborter?.abort());
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  return (shown) => {
    aborter?.abort();
    aborter = null;
    end();
    model = shown;
    if (prompt.value === suggested) prompt.value = suggested = shown.example_prompt ?? suggested; // else a person's own
    output.textContent = "";
    rate.textContent = "";
    $("[data-seed]", section).replaceChildren();
    $("[data-shown]", section).hidden = true;
    $(".curl pre", section).textContent = curl("v1/completions", body());
  };
}
