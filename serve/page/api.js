// The server's endpoints. Knows requests, keys, events and errors; nothing of what is shown.

const KEY = "sdrt.key";
let key = stored();
let asking = null;

/** What the server refused or could not do, in words for the user. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message[0].toUpperCase() + message.slice(1));
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

/** `ask(why)` resolves to a key, or null. Requests that need one wait for one question. */
export function askForKeysWith(ask) {
  asking = { ask, open: null };
}

/** The names of the server's models, the default first. */
export async function models() {
  return (await (await request("/v1/models")).json()).data.map((each) => each.id);
}

/** One model, {sizes, …}; while the server loads it, `wait` hears so and it is asked again. */
export async function model(name, wait) {
  try {
    return await (await request(`/v1/models/${encodeURIComponent(name)}`)).json();
  } catch (error) {
    if (error.status !== 503 || !error.retryAfter) throw error;
    wait("The model is being loaded…");
    await new Promise((resolve) => setTimeout(resolve, 1000 * error.retryAfter));
    return model(name, wait);
  }
}

export async function samplers() {
  return (await request("/sdapi/v1/samplers")).json();
}

/** Events of one picture as they come: {type, ...}, the first one that it was accepted; raises
 * ApiError. Aborting cancels the run. */
export async function* generate(settings, signal) {
  const { start, mask, ...rest } = settings;
  const asked = { ...rest, n: 1, stream: true, partial_images: 100, progress: true, output_format: "png" };
  const [path, options] = start ? edit(asked, start, mask) : generation(asked);
  const response = await request(path, { ...options, method: "POST", signal });
  yield { type: "accepted" };
  for await (const event of eventsOf(response.body)) {
    if (event.type === "error") throw new ApiError(event.error?.message || "The server failed.");
    yield event;
  }
}

function generation({ seed, ...asked }) {
  // A seed has up to 64 bits, a JavaScript number 53: its digits are written as they are.
  const body = `${JSON.stringify(asked).slice(0, -1)},"seed":${seed}}`;
  return ["/v1/images/generations", { body, headers: { "Content-Type": "application/json" } }];
}

function edit(asked, start, mask) {
  const body = new FormData();
  body.set("image", start, "start");
  if (mask) body.set("mask", mask, "mask.png");
  for (const [name, value] of Object.entries(asked)) body.set(name, String(value));
  return ["/v1/images/edits", { body }];
}

function stored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // forbidden: it is asked for on every visit
  }
}

async function request(path, options = {}, refused = null) {
  const used = key;
  const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
  const response = await reached(path, { ...options, headers });
  if (response.ok) return response;
  const error = await errorOf(response);
  if (response.status !== 401 || !(await newKey(used, refused ?? error.message))) throw error;
  return request(path, options, "That key was not accepted.");
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
}

async function newKey(used, why) {
  if (key !== used) return true; // another request asked meanwhile
  asking.open ??= asking.ask(why).finally(() => (asking.open = null));
  const given = await asking.open;
  if (!given) return false;
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // forbidden: known until the page is left
  }
  return true;
}

async function errorOf(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    message = body.error?.message || body.detail || message;
  } catch {
    // not JSON: the status has to do
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10) || null;
  if (seconds) message = `${message}. Try again in ${seconds} s.`;
  return new ApiError(String(message), response.status, seconds);
}

/** Server-sent events of a body whose data are JSON; comments are skipped. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const blocks = (text + value).split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the picture was finished.");
  }
}

function eventOf(block) {
  let type = "";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) type = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (!data.length || data[0] === "[DONE]") return null;
  return { type, ...JSON.parse(data.join("\n")) };
}

/** A picture from base64, its type told by its first byte. */
export function pictureFrom(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const type = { 0x89: "image/png", 0xff: "image/jpeg", 0x52: "image/webp" }[bytes[0]];
  return new Blob([bytes], { type: type ?? "image/png" });
}
