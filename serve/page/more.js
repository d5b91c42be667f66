// The section "More settings", and what an image costs with the current ones.

import { estimate } from "./api.js";
import { addOption, selectOption } from "./select.js";

const $ = (id) => document.getElementById(id);
const DELAY = 300; // ms after the last change
// By id of the field: the value that changes nothing.
const DEFAULTS = {
  guidance_rescale: 0,
  guidance_start: 0,
  guidance_end: 1,
  feature_reuse: 1,
  feature_reuse_order: 0,
  output_reuse: 1,
  clip_skip: 0,
  hires_scale: 1,
  hires_steps: 0,
  hires_strength: 0.7,
};
export const MORE_NUMBERS = Object.keys(DEFAULTS);
const HIRES = ["hires_steps", "hires_strength"];
// By value of the field `preset`, as the server's option of that name means them.
const PRESETS = {
  exact: { feature_reuse: 1, output_reuse: 1 },
  balanced: { feature_reuse: 1, output_reuse: 3 },
  fast: { feature_reuse: 1, output_reuse: 5 },
};

/** Estimates the cost after every change; `read()` returns the settings, null if invalid. Returns a
 * function that does so, too. */
export function setUpMore(read) {
  let timer = null;
  const update = () => {
    showHires();
    showReuse();
    showChanges();
    clearTimeout(timer);
    timer = setTimeout(() => showCost(read()), DELAY);
  };
  $("form").addEventListener("input", update);
  $("reset-more").addEventListener("click", () => fillMore({}, true));
  $("preset").addEventListener("input", () => {
    for (const [id, value] of Object.entries(PRESETS[$("preset").value])) setValue(id, value);
  });
  return update;
}

/** Shows the fields that a model supports; `saved` is the upscaler of the draft. */
export function offerMore({ feature_reuse = false, upscalers = [] }, saved = "Latent") {
  $("feature-reuse-field").hidden = !feature_reuse;
  if (!feature_reuse) setValue("feature_reuse", 1);
  const before = $("hires_upscaler").value;
  $("hires_upscaler").replaceChildren();
  for (const name of upscalers) addOption($("hires_upscaler"), name);
  selectOption($("hires_upscaler"), before || saved);
}

const isReuse = () => $("feature_reuse").valueAsNumber > 1;

/** Shows the order where it counts, and the preset that the fields amount to. */
function showReuse() {
  $("feature-reuse-order-field").hidden = !isReuse();
  const isCurrent = (values) => Object.entries(values).every(([id, value]) => $(id).valueAsNumber === value);
  $("preset").value = Object.keys(PRESETS).find((name) => isCurrent(PRESETS[name])) ?? "";
}

const isHires = () => $("hires_scale").valueAsNumber > 1 && !$("hires-field").hidden;

function showHires() {
  $("hires-settings").hidden = !isHires();
}

function showChanges() {
  const changed = MORE_NUMBERS.filter((id) => isMoreUsed(id) && $(id).valueAsNumber !== DEFAULTS[id]);
  $("more-changed").textContent = changed.length ? `${changed.length} changed` : "";
  $("reset-more").hidden = !changed.length;
}

/** Whether a number counts: what it refines is on. */
export function isMoreUsed(id) {
  if (HIRES.includes(id)) return isHires();
  if (id === "feature_reuse_order") return isReuse();
  return id !== "hires_scale" || !$("hires-field").hidden;
}

/** The settings that are not at their defaults. */
export function moreSettings() {
  const settings = {};
  const [low, high] = ["guidance_start", "guidance_end"].map((id) => $(id).valueAsNumber);
  if (low !== 0 || high !== 1) settings.guidance_interval = [low, high];
  for (const id of ["guidance_rescale", "feature_reuse", "feature_reuse_order", "output_reuse", "clip_skip"]) {
    if (isMoreUsed(id) && $(id).valueAsNumber !== DEFAULTS[id]) settings[id] = $(id).valueAsNumber;
  }
  if (!isHires()) return settings;
  for (const id of ["hires_scale", ...HIRES]) settings[id] = $(id).valueAsNumber;
  return { ...settings, hires_upscaler: $("hires_upscaler").value };
}

/** Fills the fields; those that `settings` lacks are reset, or left as they are. */
export function fillMore({ guidance_interval, hires_upscaler, ...settings }, reset) {
  const interval = guidance_interval && { guidance_start: guidance_interval[0], guidance_end: guidance_interval[1] };
  const values = { ...(reset && DEFAULTS), ...settings, ...interval };
  for (const id of MORE_NUMBERS) if (values[id] !== undefined) setValue(id, values[id]);
  if (hires_upscaler || reset) selectOption($("hires_upscaler"), hires_upscaler ?? "Latent");
}

function setValue(id, value) {
  $(id).value = value;
  $(id).dispatchEvent(new Event("input", { bubbles: true }));
}

let asked = 0; // so that an answer to earlier settings is not shown

async function showCost(settings) {
  const number = ++asked;
  const show = (text) => number === asked && ($("cost").textContent = text);
  if (!settings) return show("");
  try {
    show(describeCost(await estimate(settings)));
  } catch (error) {
    show(error.status === 400 ? error.message : "");
  }
}

function describeCost({ evaluations, shallow_evaluations: shallow, rows, seconds }) {
  const count = `${evaluations} evaluations${shallow ? `, ${shallow} of them shallow` : ""}`;
  const rounded = Number(seconds.toPrecision(2));
  const time = rounded >= 120 ? `${Math.round(rounded / 60)} min` : `${rounded} s`;
  return `${count} · ${rows} rows · about ${time} an image`.replaceAll(/(?<!·) (?!·)/g, "\u00a0");
}
