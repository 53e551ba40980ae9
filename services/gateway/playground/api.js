// Requests to the gateway that sent this page. The key is kept in the sessionStorage of this tab only.

const ROOT = new URL("..", import.meta.url);
const STORED = "genmodels-key";

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

/** Send a request and return its Response, or throw an ApiError. With a `body`, it is a POST of JSON. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the gateway does not answer; check that it is running");
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  throw apiError(content, response.status);
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

/** Yield the events of a streamed answer; throw an ApiError for an error event, and for an end without [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the answer was cut off before its end");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw apiError(event, 0);
      yield event;
    }
  }
}

export const modelPath = (name, rest = "") => `v1/models/${encodeURIComponent(name)}${rest}`;

/** Return the images of an answer as data: URLs. */
export const pictures = (answer) => answer.data.map((item) => `data:image/png;base64,${item.b64_json}`);

/** Return the same request as a curl command. */
export function curl(path, body) {
  const secret = key.get() ? ` -H "Authorization: Bearer $GENMODELS_KEY"` : "";
  const sent = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl -s${body.stream ? "N" : ""} ${new URL(path, ROOT)}${secret} -H 'content-type: application/json' -d '${sent}'`;
}

function apiError(content, status) {
  const error = content?.error;
  return new ApiError(error?.message ?? `the gateway answered ${status}`, status, error?.code);
}
