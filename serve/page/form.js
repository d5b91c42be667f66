// The form: reads, validates, fills and saves its fields. Knows nothing of requests.

import { CONTROL_NUMBERS, controlSettings, fillControl, isControlUsed, setUpControl } from "./control.js";
import { editMask, setUpMask } from "./mask.js";

const $ = (id) => document.getElementById(id);
const DRAFT = "sdrt.form";
const NUMBERS = ["num_inference_steps", "guidance_scale", "count", "strength", ...CONTROL_NUMBERS];
const TEXTS = ["prompt", "negative_prompt", "scheduler", "model"];
const CUSTOM = "custom";
const MAX_SEED = 2n ** 64n - 1n;

let start = null; // Blob: the input image of image-to-image
let mask = null; // Blob: its mask; null repaints all of it

/** Registers the form's own event handlers and restores the saved draft. */
export function setUpForm() {
  for (const id of NUMBERS) joinSlider($(id));
  restoreDraft();
  $("form").addEventListener("input", saveDraft);
  $("size").addEventListener("change", showCustomSize);
  $("random-seed").addEventListener("click", () => setSeed(""));
  $("start-file").addEventListener("change", () => setStart($("start-file").files[0] ?? null));
  setUpMask();
  setUpControl();
  $("insert").addEventListener("change", insertWord);
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
  for (const { name, aliases } of samplers) addOption($("scheduler"), name, aliases);
  selectOption($("scheduler"), before);
}

/** Lists words for the prompt by group, each {label, text}; hidden without any. */
export function offerWords(groups) {
  $("insert").replaceChildren(new Option("Insert…", ""));
  for (const [label, words] of Object.entries(groups)) {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...words.map(({ label, text }) => new Option(label, text)));
    if (words.length) $("insert").append(group);
  }
  $("insert").hidden = $("insert").options.length < 2;
}

function insertWord() {
  const word = $("insert").value;
  $("insert").value = "";
  $("prompt").setRangeText(` ${word} `, $("prompt").selectionStart, $("prompt").selectionEnd, "end");
  $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
  $("prompt").focus();
}

export const chosenModel = () => $("model").value;
export const chooseModel = (name) => selectOption($("model"), name);

/** Lists the sizes of the selected model, its default first, then a custom one in steps of `multiple`. */
export function offerSizes(sizes, multiple) {
  const before = $("size").value ? sizeOf() : loadDraft().size;
  fillSelect($("size"), sizes);
  $("size").add(new Option("Custom…", CUSTOM));
  for (const id of ["width", "height"]) $(id).step = $(id).min = multiple ?? 8;
  $("size-hint").textContent = `multiples of ${$("width").step}`;
  [$("width").value, $("height").value] = (sizes[0] ?? "512x512").split("x");
  chooseSize(before);
}

const isCustom = () => $("size").value === CUSTOM;
const sizeOf = () => (isCustom() ? `${$("width").value}x${$("height").value}` : $("size").value);

function showCustomSize() {
  $("custom-size").hidden = !isCustom();
}

/** Selects a listed size, or enters it as a custom one; returns whether it is possible. */
function chooseSize(size) {
  const [width, height] = /^(\d+)x(\d+)$/.exec(size ?? "")?.slice(1).map(Number) ?? [];
  const listed = selectOption($("size"), size);
  if (!listed && [width, height].every(fitsStep)) {
    Object.assign($("width"), { value: width });
    Object.assign($("height"), { value: height });
    $("size").value = CUSTOM;
  }
  showCustomSize();
  return listed || isCustom();
}

function fitsStep(side) {
  return side >= Number($("width").min) && side <= Number($("width").max) && side % Number($("width").step) === 0;
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

/** Selects an option by its value or an alias; returns whether there is one. */
function selectOption(select, value) {
  if (value === undefined) return false;
  const sought = String(value).toLowerCase();
  const found = [...select.options].find(
    (option) => option.value === value || option.dataset.aliases?.split("\n").includes(sought),
  );
  if (found) select.value = found.value;
  return Boolean(found);
}

/** The settings of each image to generate; on an invalid field, focuses it and returns null. */
export function settingsFromForm(showError) {
  const invalid = ["width", "height", ...NUMBERS, "seed", "prompt"].find(validationError);
  if (invalid) {
    $(invalid).focus();
    showError(validationError(invalid));
    return null;
  }
  const first = BigInt($("seed").value.trim() || randomSeed());
  const settings = { prompt: $("prompt").value.trim(), negative_prompt: $("negative_prompt").value.trim() };
  for (const id of ["num_inference_steps", "guidance_scale"]) settings[id] = $(id).valueAsNumber;
  for (const id of ["scheduler", "model"]) if ($(id).value) settings[id] = $(id).value;
  if (sizeOf()) settings.size = sizeOf();
  Object.assign(settings, controlSettings());
  if (start) Object.assign(settings, { start, mask, strength: $("strength").valueAsNumber });
  const count = $("count").valueAsNumber;
  return Array.from({ length: count }, (_, i) => ({ ...settings, seed: String(first + BigInt(i)) }));
}

function validationError(id) {
  const field = $(id);
  if (id === "prompt") return field.value.trim() ? "" : "Enter a prompt that describes the image.";
  if (id === "strength" && !start) return "";
  if (CONTROL_NUMBERS.includes(id) && !isControlUsed(id)) return "";
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
  for (const id of ["prompt", "negative_prompt", ...NUMBERS]) {
    if (settings[id] !== undefined) setValue($(id), settings[id]);
  }
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
  $("mask-state").textContent = mask ? "Mask set." : "";
  $("mask-open").textContent = mask ? "Edit mask…" : "Paint a mask…";
  $("start-hint").hidden = Boolean(start);
  if (!start) $("start-file").value = "";
}

/** Saves the fields for the next visit, if the browser allows it. */
function saveDraft() {
  const values = Object.fromEntries([...TEXTS, ...NUMBERS, "seed"].map((id) => [id, $(id).value]));
  values.size = sizeOf();
  try {
    localStorage.setItem(DRAFT, JSON.stringify(values));
  } catch {
    // quota exceeded, or storage is disabled
  }
}

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
