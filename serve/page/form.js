// The form: reads, validates, fills and saves its fields. Knows nothing of requests.

import { CONTROL_NUMBERS, controlSettings, fillControl, isControlUsed, setUpControl } from "./control.js";
import { editMask, setUpMask } from "./mask.js";
import { fillMore, isMoreUsed, MORE_NUMBERS, moreSettings } from "./more.js";
import { addOption, fillSelect, selectOption } from "./select.js";
import { chooseSize, isCustom, offerSizes as listSizes, setUpSizes, sizeOf } from "./sizes.js";

const $ = (id) => document.getElementById(id);
const DRAFT = "sdrt.form";
const BASIC_NUMBERS = ["num_inference_steps", "guidance_scale", "count", "strength", ...CONTROL_NUMBERS];
const NUMBERS = [...BASIC_NUMBERS, ...MORE_NUMBERS];
const TEXTS = ["prompt", "negative_prompt", "scheduler", "model"];
const CHECKED = ["width", "height", ...NUMBERS, "seed"];
const MAX_SEED = 2n ** 64n - 1n;

let start = null; // Blob: the input image of image-to-image
let mask = null; // Blob: its mask; null repaints all of it

/** Registers the form's own event handlers and restores the saved draft. */
export function setUpForm() {
  for (const id of NUMBERS) joinSlider($(id));
  restoreDraft();
  $("form").addEventListener("input", saveDraft);
  setUpSizes();
  $("random-seed").addEventListener("click", () => setSeed(""));
  $("start-file").addEventListener("change", () => setStart($("start-file").files[0] ?? null));
  setUpMask();
  setUpControl();
  $("mask-open").addEventListener("click", async () => {
    mask = await editMask(start, mask);
    showStart();
  });
  $("start-remove").addEventListener("click", () => {
    setStart(null);
    $("start-file").focus();
  });
}

/** Keeps a slider and a number box in step; the box also accepts values outside the slider's range. */
function joinSlider(box) {
  const slider = box.parentElement.querySelector("[type=range]");
  const follow = () => {
    slider.value = box.value;
    const fraction = (slider.value - slider.min) / (slider.max - slider.min);
    slider.style.setProperty("--filled", `${100 * fraction}%`);
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
  selectOption($("model"), loadDraft().model);
}

export function offerSamplers(samplers) {
  const before = $("scheduler").value || loadDraft().scheduler;
  for (const { name, aliases } of samplers) addOption($("scheduler"), name, { aliases });
  selectOption($("scheduler"), before);
}

export const chosenModel = () => $("model").value;
export const chooseModel = (name) => selectOption($("model"), name);

/** Lists the sizes of the selected model, the last one selected. */
export function offerSizes(sizes, multiple) {
  listSizes(sizes, multiple, $("size").value ? sizeOf() : loadDraft().size);
}

/** The settings of each image to generate; on an invalid field, focuses it and returns null. */
export function settingsFromForm(showError) {
  const invalid = [...CHECKED, "prompt"].find(validationError);
  if (invalid) {
    $(invalid).closest("details")?.setAttribute("open", "");
    $(invalid).focus();
    showError(validationError(invalid));
    return null;
  }
  const first = BigInt($("seed").value.trim() || randomSeed());
  const settings = readSettings();
  const count = $("count").valueAsNumber;
  return Array.from({ length: count }, (_, i) => ({ ...settings, seed: String(first + BigInt(i)) }));
}

/** The settings without a seed; null if a field other than the prompt is invalid. */
export const currentSettings = () => (CHECKED.some(validationError) ? null : readSettings());

function readSettings() {
  const settings = { prompt: $("prompt").value.trim(), negative_prompt: $("negative_prompt").value.trim() };
  for (const id of ["num_inference_steps", "guidance_scale"]) settings[id] = $(id).valueAsNumber;
  for (const id of ["scheduler", "model"]) if ($(id).value) settings[id] = $(id).value;
  if (sizeOf()) settings.size = sizeOf();
  Object.assign(settings, moreSettings(), controlSettings());
  if (start) Object.assign(settings, { start, mask, strength: $("strength").valueAsNumber });
  return settings;
}

function validationError(id) {
  const field = $(id);
  if (id === "prompt") return field.value.trim() ? "" : "Enter a prompt that describes the image.";
  if (id === "strength" && !start) return "";
  if (CONTROL_NUMBERS.includes(id) && !isControlUsed(id)) return "";
  if (MORE_NUMBERS.includes(id) && !isMoreUsed(id)) return "";
  if (["width", "height"].includes(id)) {
    const { ariaLabel, step, min, max } = field;
    return !isCustom() || field.checkValidity() ? "" : `${ariaLabel} must be a multiple of ${step} from ${min} to ${max}.`;
  }
  const name = document.querySelector(`label[for=${id}]`).textContent;
  if (id === "seed") {
    const seed = field.value.trim();
    const fits = /^\d{0,20}$/.test(seed) && BigInt(seed || 0) <= MAX_SEED;
    return fits ? "" : `${name} must be a whole number from 0 to ${MAX_SEED}, or empty for a random seed.`;
  }
  const integer = field.step === "1" ? "a whole number from " : "from ";
  return field.checkValidity() ? "" : `${name} must be ${integer}${field.min} to ${field.max}.`;
}

/** Fills the form from `settings`; returns the values that this server does not offer. */
export function fillForm(settings) {
  const unavailable = [];
  const select = { model: chooseModel, size: chooseSize, scheduler: (name) => selectOption($("scheduler"), name) };
  for (const [id, choose] of Object.entries(select)) {
    if (settings[id] !== undefined && !choose(settings[id])) unavailable.push(settings[id]);
  }
  for (const id of ["prompt", "negative_prompt", ...BASIC_NUMBERS]) {
    if (settings[id] !== undefined) setValue($(id), settings[id]);
  }
  fillMore(settings, "num_inference_steps" in settings);
  if (settings.seed !== undefined) setSeed(settings.seed);
  if ("start" in settings) {
    setStart(settings.start, settings.mask);
    fillControl(settings);
  }
  saveDraft();
  return unavailable;
}

function setValue(field, value) {
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

export function setSeed(seed) {
  setValue($("seed"), seed);
}

function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

export function setStart(image, newMask = null) {
  start = image;
  mask = newMask;
  showStart();
  if (image) requestAnimationFrame(() => $("strength-field").scrollIntoView({ block: "nearest" }));
}

function showStart() {
  URL.revokeObjectURL($("start-image").src);
  if (start) $("start-image").src = URL.createObjectURL(start);
  else $("start-image").removeAttribute("src");
  for (const id of ["start-image", "start-remove", "mask-field", "strength-field"]) $(id).hidden = !start;
  $("hires-field").hidden = Boolean(start);
  $("mask-state").textContent = mask ? "Mask set." : "";
  $("mask-open").textContent = mask ? "Edit mask…" : "Paint a mask…";
  $("start-hint").hidden = Boolean(start);
  if (!start) $("start-file").value = "";
  $("form").dispatchEvent(new Event("input")); // the cost changes
}

/** Saves the fields for the next visit, if the browser allows it. */
function saveDraft() {
  const values = Object.fromEntries([...TEXTS, ...NUMBERS, "hires_upscaler", "seed"].map((id) => [id, $(id).value]));
  values.size = sizeOf();
  try {
    localStorage.setItem(DRAFT, JSON.stringify(values));
  } catch {
    // quota exceeded, or storage is disabled
  }
}

export const savedValue = (id) => loadDraft()[id];

function loadDraft() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}

function restoreDraft() {
  const values = loadDraft();
  for (const id of ["prompt", "negative_prompt", "seed", ...NUMBERS]) {
    if (values[id] !== undefined) setValue($(id), values[id]);
  }
}
