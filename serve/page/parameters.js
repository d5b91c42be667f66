// Reads generation settings from the `parameters` text of PNG files. Knows nothing of the page.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const NAMES = {
  Steps: "num_inference_steps",
  "CFG scale": "guidance_scale",
  Seed: "seed",
  Size: "size",
  Sampler: "scheduler",
  Model: "model",
  "Denoising strength": "strength",
  "Feature reuse": "feature_reuse",
  "Feature reuse order": "feature_reuse_order",
  "Output reuse": "output_reuse",
  "CFG rescale": "guidance_rescale",
  "Hires upscale": "hires_scale",
  "Hires upscaler": "hires_upscaler",
  "Hires steps": "hires_steps",
};

/** Reads the `parameters` text of a PNG file; null if there is none or the file is not a PNG. */
export async function readPngText(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const data = bytes.subarray(at + 8, at + 8 + length);
    const text = data.length === length ? await decodeChunk(latin1(bytes.subarray(at + 4, at + 8)), data) : null;
    if (text !== null) return text;
    at += 12 + length;
  }
  return null;
}

async function decodeChunk(type, data) {
  const end = data.indexOf(0);
  if (!["tEXt", "zTXt", "iTXt"].includes(type) || latin1(data.subarray(0, end)) !== "parameters") return null;
  if (type === "tEXt") return latin1(data.subarray(end + 1));
  if (type === "zTXt") return latin1(await inflate(data.subarray(end + 2)));
  const language = data.indexOf(0, end + 3);
  const text = data.subarray(data.indexOf(0, language + 1) + 1);
  return new TextDecoder().decode(data[end + 1] ? await inflate(text) : text);
}

function latin1(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Parses the text: the prompt, `Negative prompt: …`, then one line of `Key: value, …`. */
export function parseSettings(text) {
  const lines = text.trim().split(/\r?\n/);
  const pairs = parsePairs(lines.at(-1));
  if ("Steps" in pairs) lines.pop();
  const negative = lines.findIndex((line) => line.startsWith("Negative prompt:"));
  const prompt = negative < 0 ? lines : lines.slice(0, negative);
  const settings = { prompt: prompt.join("\n").trim(), negative_prompt: "" };
  if (negative >= 0) {
    settings.negative_prompt = lines.slice(negative).join("\n").slice("Negative prompt:".length).trim();
  }
  if (!("Steps" in pairs)) return settings;
  for (const [key, name] of Object.entries(NAMES)) if (key in pairs) settings[name] = pairs[key];
  if (pairs["Clip skip"]) settings.clip_skip = Number(pairs["Clip skip"]) - 1; // others count the last layer
  if (pairs["CFG interval"]) settings.guidance_interval = pairs["CFG interval"].split(":").map(Number);
  if ("Hires upscaler" in pairs) {
    settings.hires_strength = settings.strength;
    delete settings.strength;
  }
  const schedule = pairs["Schedule type"]; // newer A1111 files name the noise schedule separately
  if (["Karras", "Exponential", "Beta"].includes(schedule)) settings.scheduler += ` ${schedule}`;
  return settings;
}

function parsePairs(line) {
  const pairs = {};
  for (const [, key, value] of line.matchAll(/\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g)) {
    pairs[key] = value.startsWith('"') ? value.slice(1, -1) : value.trim();
  }
  return pairs;
}
