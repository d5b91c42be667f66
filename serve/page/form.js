// The form: its fields, what they hold and how they are filled. Knows nothing of requests.

import { paintedMask, setUpMask } from "./mask.js";

const $ = (id) => document.getElementById(id);
const KEPT = "sdrt.form";
const NUMBERS = ["num_inference_steps", "guidance_scale", "count", "strength"];
const TEXTS = ["prompt", "negative_prompt", "scheduler", "size", "model"];
const LARGEST_SEED = 2n ** 64n - 1n;

let start = null; // the picture to start from, a Blob
let mask = null; // what of it is to be made new, a Blob; null is all of it

/** Everything that the form does by itself. */
export function setUpForm() {
  for (const id of NUMBERS) joinSlider($(id));
  restore();
  $("form").addEventListener("input", keep);
  $("dice").addEventListener("click", () => setSeed(""));
  $("start-file").addEventListener("change", () => setStart($("start-file").files[0] ?? null));
  setUpMask();
  $("mask-open").addEventListener("click", async () => {
    mask = await paintedMask(start, mask);
    showStart();
  });
  $("start-remove").addEventListener("click", () => {
    setStart(null);
    $("start-file").focus();
  });
}

/** One slider and one number box hold one value; the box alone reaches beyond the slider's ends. */
function joinSlider(box) {
  const slider = box.parentElement.querySelector("[type=range]");
  const follow = () => {
    slider.value = box.value;
    const share = (slider.value - slider.min) / (slider.max - slider.min);
    slider.style.setProperty("--filled", `${100 * share}%`);
  };
  slider.addEventListener("input", () => {
    box.value = slider.value;
    follow();
  });
  box.addEventListener("input", follow);
  follow();
}

export function offerModels(names) {
  fillSelect($("model"), names);
  choose($("model"), kept().model);
}

export function offerSamplers(samplers) {
  const before = $("scheduler").value || kept().scheduler;
  for (const { name, aliases } of samplers) addOption($("scheduler"), name, aliases);
  choose($("scheduler"), before);
}

export const chosenModel = () => $("model").value;
export const chooseModel = (name) => choose($("model"), name);

/** What the chosen model offers: its sizes, the usual one first. */
export function offerSizes(sizes) {
  const before = $("size").value || kept().size;
  fillSelect($("size"), sizes);
  choose($("size"), before);
}

function fillSelect(select, values) {
  select.replaceChildren();
  for (const value of values) addOption(select, value);
}

function addOption(select, value, aliases = []) {
  const option = new Option(value.replace(/^(\d+)x(\d+)$/, "$1 × $2"), value);
  option.dataset.aliases = [value, ...aliases].join("\n").toLowerCase();
  select.add(option);
}

/** Choose an option by its value or another of its names; false where there is none. */
function choose(select, value) {
  if (value === undefined) return false;
  const sought = String(value).toLowerCase();
  const found = [...select.options].find(
    (option) => option.value === value || option.dataset.aliases?.split("\n").includes(sought),
  );
  if (found) select.value = found.value;
  return Boolean(found);
}

/** The settings of every picture asked for; null, with the field focused, if one is not allowed. */
export function settingsFromForm(complain) {
  const wrong = [...NUMBERS, "seed", "prompt"].map((id) => [id, faultOf(id)]).find(([, fault]) => fault);
  if (wrong) {
    $(wrong[0]).focus();
    complain(wrong[1]);
    return null;
  }
  const first = BigInt($("seed").value.trim() || drawnSeed());
  const settings = { prompt: $("prompt").value.trim(), negative_prompt: $("negative_prompt").value.trim() };
  for (const id of ["num_inference_steps", "guidance_scale"]) settings[id] = $(id).valueAsNumber;
  for (const id of ["scheduler", "size", "model"]) if ($(id).value) settings[id] = $(id).value;
  if (start) Object.assign(settings, { start, mask, strength: $("strength").valueAsNumber });
  const count = $("count").valueAsNumber;
  return Array.from({ length: count }, (_, i) => ({ ...settings, seed: String(first + BigInt(i)) }));
}

function faultOf(id) {
  const field = $(id);
  if (id === "prompt") return field.value.trim() ? "" : "The prompt is empty. Say what the picture should show.";
  if (id === "strength" && !start) return "";
  const name = document.querySelector(`label[for=${id}]`).textContent;
  if (id === "seed") {
    const seed = field.value.trim();
    const fits = /^\d{0,20}$/.test(seed) && BigInt(seed || 0) <= LARGEST_SEED;
    return fits ? "" : `${name}: a whole number from 0 to ${LARGEST_SEED}, or nothing for a random one.`;
  }
  const whole = field.step === "1" ? "a whole number from " : "";
  return field.checkValidity() ? "" : `${name}: ${whole}${field.min} to ${field.max}.`;
}

/** Fill in what `settings` names; the names of those that this server does not have come back. */
export function fillForm(settings) {
  const missing = [];
  for (const id of ["model", "size", "scheduler"]) {
    if (settings[id] !== undefined && !choose($(id), settings[id])) missing.push(settings[id]);
  }
  for (const id of ["prompt", "negative_prompt", ...NUMBERS]) {
    if (settings[id] !== undefined) setValue($(id), settings[id]);
  }
  if (settings.seed !== undefined) setSeed(settings.seed);
  if ("start" in settings) setStart(settings.start, settings.mask);
  keep();
  return missing;
}

function setValue(field, value) {
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

export function setSeed(seed) {
  setValue($("seed"), seed);
}

function drawnSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

export function setStart(picture, painted = null) {
  start = picture;
  mask = painted;
  showStart();
  if (picture) requestAnimationFrame(() => $("strength-field").scrollIntoView({ block: "nearest" }));
}

function showStart() {
  URL.revokeObjectURL($("start-picture").src);
  if (start) $("start-picture").src = URL.createObjectURL(start);
  else $("start-picture").removeAttribute("src");
  for (const id of ["start-picture", "start-remove", "mask-field", "strength-field"]) $(id).hidden = !start;
  $("mask-state").textContent = mask ? "A part of it is to change." : "";
  $("mask-open").textContent = mask ? "Change which…" : "Paint what is to change…";
  $("start-hint").hidden = Boolean(start);
  if (!start) $("start-file").value = "";
}

/** What was typed outlives a reload, where the browser stores anything. */
function keep() {
  const values = Object.fromEntries([...TEXTS, ...NUMBERS, "seed"].map((id) => [id, $(id).value]));
  try {
    localStorage.setItem(KEPT, JSON.stringify(values));
  } catch {
    // too long, or forbidden
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function restore() {
  const values = kept();
  for (const id of ["prompt", "negative_prompt", "seed", ...NUMBERS]) {
    if (values[id] !== undefined) setValue($(id), values[id]);
  }
}
