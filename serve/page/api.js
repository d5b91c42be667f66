// Client of the server's endpoints. Knows requests, API keys, events and errors; not what is displayed.

const KEY = "sdrt.key";
const KEY_REQUIRED = "This server requires an API key.";
let key = storedKey();
let keyDialog = null;

/** An error response of the server, or a failed request, with a message for the user. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message[0].toUpperCase() + message.slice(1));
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

/** `ask(message)` resolves to a key, or null. Requests that need a key share one dialog. */
export function setKeyDialog(ask) {
  keyDialog = { ask, open: null };
}

/** The names of the server's models, the default first. */
export async function models() {
  return (await (await request("/v1/models")).json()).data.map(({ id }) => id);
}

/** One model, {sizes, …}. Calls `onWait(message)` and retries while the server is loading it. */
export async function model(name, onWait) {
  try {
    return await (await request(`/v1/models/${encodeURIComponent(name)}`)).json();
  } catch (error) {
    if (error.status !== 503 || !error.retryAfter) throw error;
    onWait("Loading the model…");
    await new Promise((resolve) => setTimeout(resolve, 1000 * error.retryAfter));
    return model(name, onWait);
  }
}

export async function samplers() {
  return (await request("/sdapi/v1/samplers")).json();
}

/** What the prompts of a model can name: {loras: [{name, alias, has_thumbnail}], embeddings: […]}. */
export async function extraNetworks(model) {
  return (await request(`/v1/extra-networks?model=${encodeURIComponent(model)}`)).json();
}

/** The thumbnail of a LoRA or an embedding. */
export async function thumbnail(kind, name) {
  return (await request(`/v1/extra-networks/${kind}/${encodeURIComponent(name)}/thumbnail`)).blob();
}

/** The images that the server stores, newest first: {enabled, data, has_more}. */
export async function listStored(query) {
  return (await request(`/v1/gallery?${new URLSearchParams(query)}`)).json();
}

/** A file of the gallery, by the `url` or `thumbnail_url` of its entry. */
export const storedFile = async (url) => (await request(url)).blob();

export const deleteStored = (id) => request(`/v1/gallery/${id}`, { method: "DELETE" });

/** {tokens, limit} of {prompt, model}. */
export const countTokens = (body) => post("/v1/tokens", JSON.stringify(body));

/** The cost of one image with these settings, whose images are not sent. */
export async function estimate({ start, mask, control_image, ip_adapter_image, seed, ...fields }) {
  for (const name of ["controlnet", "controlnet_conditioning_scale", "ip_adapter_scale"]) delete fields[name];
  return post("/v1/images/estimates", JSON.stringify(fields));
}

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body })).json();
}

/** Streams the events of one image: first {type: "accepted"}, then those of the server. Throws
 * ApiError. Aborting `signal` cancels the generation. */
export async function* generate(settings, signal) {
  const { start, mask, control_image, ip_adapter_image, ...rest } = settings;
  const images = Object.entries({ control_image, ip_adapter_image }).filter(([, image]) => image);
  const fields = { ...rest, n: 1, stream: true, partial_images: 100, progress: true, output_format: "png" };
  const [path, options] = start ? edit(fields, start, mask, images) : await generation(fields, images);
  const response = await request(path, { ...options, method: "POST", signal });
  yield { type: "accepted" };
  for await (const event of readEvents(response.body)) {
    if (event.type === "error") throw new ApiError(event.error?.message || "The server failed.");
    yield event;
  }
}

async function generation({ seed, ...fields }, images) {
  for (const [name, image] of images) fields[name] = await base64FromImage(image);
  // Seeds have 64 bits, JavaScript numbers 53: the digits are inserted as text.
  const body = `${JSON.stringify(fields).slice(0, -1)},"seed":${seed}}`;
  return ["/v1/images/generations", { body, headers: { "Content-Type": "application/json" } }];
}

function edit(fields, start, mask, images) {
  const body = new FormData();
  body.set("image", start, "start");
  if (mask) body.set("mask", mask, "mask.png");
  for (const [name, image] of images) body.set(name, image, name);
  for (const [name, value] of Object.entries(fields)) {
    for (const item of [value].flat()) body.append(name, String(item)); // lists are repeated fields
  }
  return ["/v1/images/edits", { body }];
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // storage is disabled: ask on every visit
  }
}

async function request(path, options = {}, keyMessage = null) {
  const sentKey = key;
  const headers = { ...options.headers, ...(sentKey && { Authorization: `Bearer ${sentKey}` }) };
  const response = await fetchOrFail(path, { ...options, headers });
  if (response.ok) return response;
  const error = await errorFromResponse(response);
  if (response.status !== 401 || !(await askForKey(sentKey, keyMessage ?? KEY_REQUIRED))) throw error;
  return request(path, options, "The server rejected this key.");
}

async function fetchOrFail(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
}

async function askForKey(sentKey, message) {
  if (key !== sentKey) return true; // changed by another request meanwhile
  keyDialog.open ??= keyDialog.ask(message).finally(() => (keyDialog.open = null));
  const entered = await keyDialog.open;
  if (!entered) return false;
  key = entered;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // storage is disabled: the key lasts as long as the page
  }
  return true;
}

async function errorFromResponse(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    message = body.error?.message || body.detail || message;
  } catch {
    // not JSON: report the status
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10) || null;
  if (seconds) message = `${message}. Try again in ${seconds} s.`;
  return new ApiError(String(message), response.status, seconds);
}

/** Parses server-sent events with JSON data from a response body; skips comments. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await readChunk(reader);
      if (done) return;
      const blocks = (text + value).split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = parseEvent(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readChunk(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the image was finished.");
  }
}

function parseEvent(block) {
  let type = "";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) type = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (!data.length || data[0] === "[DONE]") return null;
  return { type, ...JSON.parse(data.join("\n")) };
}

async function base64FromImage(image) {
  const reader = new FileReader();
  const loaded = new Promise((resolve, reject) => Object.assign(reader, { onload: resolve, onerror: reject }));
  reader.readAsDataURL(image);
  await loaded;
  return reader.result;
}

/** Decodes an image from base64; the first byte gives its type. */
export function imageFromBase64(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const type = { 0x89: "image/png", 0xff: "image/jpeg", 0x52: "image/webp" }[bytes[0]];
  return new Blob([bytes], { type: type ?? "image/png" });
}
